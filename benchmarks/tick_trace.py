"""What the GPU does during a tick, from a profiler's trace of a short run: backbone, head with sampling, idling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.graph_profile import Kernel, busy_time, traced
from mdkern import DiT, sample
from mdkern.profiling.profile import Setting

# A tick runs from one `BEGIN` to the next: `BEGIN`, the backbone's kernels, from `HEAD` on the output layer's.
BEGIN, HEAD = "begin_tick_kernel", ("vocab_projection", "filtered_logits")  # the latter: how names begin
TRACED_STEPS = 100


def few_masked(model: DiT, setting: Setting, sequences: int, steps: int = TRACED_STEPS) -> dict[str, Any]:
    """`sample`'s arguments for a run of so many steps, with as many positions masked for each as in the setting's."""
    steps = min(steps, setting.steps)
    masked = max(1, setting.length * steps // setting.steps)
    ids = torch.zeros(sequences, setting.length, dtype=torch.int64, device=model.embedding.device)
    ids[:, torch.linspace(0, setting.length - 1, masked).long()] = model.config.mask_id
    return {"input_ids": ids, "steps": steps, "batch_size": setting.batch_size, "seed": 0, "progress": False}


def trace_ticks(model: DiT, setting: Setting) -> dict[str, Any]:
    """Trace a short run."""
    options = few_masked(model, setting, setting.batch_size)
    sample(model, **options)
    return split_ticks(traced(lambda: sample(model, **options)))


def split_ticks(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Means over all ticks but the last.

    Returns:
        In milliseconds: ``tick_ms`` from one `BEGIN` to the next; ``backbone_ms``, and ``head_ms`` with sampling and
        bookkeeping, that their kernels lasted. ``idle_share`` of the time in which no kernel ran. The dearest kernels.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    begins = [index for index, kernel in enumerate(ordered) if kernel.name == BEGIN]
    if len(begins) < 2:
        return {"ticks": 0}
    inside = ordered[begins[0] : begins[-1]]
    span, ticks = ordered[begins[-1]].start - ordered[begins[0]].start, len(begins) - 1
    spent, by_name = defaultdict[str, float](float), defaultdict[str, float](float)
    stage = "head"
    for kernel in inside:
        if kernel.name.startswith(HEAD):
            stage = "head"
        lasted = kernel.end - kernel.start
        spent["head" if kernel.name == BEGIN else stage] += lasted
        by_name[kernel.name] += lasted
        if kernel.name == BEGIN:
            stage = "backbone"
    dearest = sorted(by_name, key=lambda name: -by_name[name])[:12]
    return {
        "ticks": ticks,
        "tick_ms": span / ticks / 1e3,
        "backbone_ms": spent["backbone"] / ticks / 1e3,
        "head_ms": spent["head"] / ticks / 1e3,
        "idle_share": 1.0 - busy_time(inside) / span,
        "kernels_us": {name[:60]: by_name[name] / ticks for name in dearest},
    }
