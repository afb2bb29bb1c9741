"""Passes so small that launches tell: the shipped pair, and one text at the paper's size.

    python -m benchmarks.bench_small_passes FOLDER              # one GPU, a minute; writes FOLDER/small-passes.json
    python -m benchmarks.bench_small_passes FOLDER --tiny       # a small model on a CPU, to try it out

Each pass is timed in CUDA graphs of several passes one after the other: as mdkern runs it; with a launch or more for
each operator, as it ran such passes before and runs them on other cards; and by the modules, in PyTorch's operators.
Whole runs are `mdkern.sample` of 16 texts by the shipped heavy model, in the first two ways.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import mdkern
from benchmarks.harness import (
    RESULTS,
    captured,
    compare_on_host,
    elapsed,
    environment,
    folder_command,
    host_environment,
    summary,
)
from benchmarks.kernel_tables import caption, markdown
from mdkern import DiT, DiTConfig, adapt
from mdkern.engine import graphs
from mdkern.files import write_whole
from mdkern.kernels.backbone import linear

WANTED = 4  # rows of the last block
PAPER = DiTConfig(vocab_size=50_258, mask_id=50_257)
TINY = DiTConfig(vocab_size=40, mask_id=39, max_length=16, num_blocks=2, width=64, num_heads=1)
RATE = 750e12  # FLOP/s of large products on an H200
TURNS, ROUNDS = 8, 15
OURS, OPERATORS, MODULES = "mdkern", "an operator a launch", "the modules"
KEPT = RESULTS / "small-passes.json"
ABSENT = "Not measured yet.\n"


@contextmanager
def by_operators() -> Iterator[None]:
    """Without products made for a thousand rows."""
    with patch.object(linear, "runs_in_the_middle", lambda *_: False), patch.object(linear, "MIDDLE_ROWS", 1 << 30):
        yield


def one_pass(label: str, model: DiT, batch: int, length: int) -> dict[str, Any]:
    """Milliseconds of a pass in each way."""
    device = model.embedding.device
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(model.config.mask_id, (batch, length), generator=generator).to(device)
    positions = torch.randint(length, (batch, WANTED), generator=generator).to(device)
    ours = adapt(model).prepared(ids.numel())
    with by_operators():
        theirs = adapt(model).prepared(ids.numel())

    def operators() -> None:
        with by_operators():
            theirs.hidden(ids, None, positions)

    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: ours.hidden(ids, None, positions),
        OPERATORS: operators,
        MODULES: lambda: model.plain_hidden(ids, None, positions),
    }
    with torch.no_grad():
        if device.type == "cpu":
            times = compare_on_host(contenders, 3)
        else:
            recorded = {name: captured(run, TURNS) for name, run in contenders.items()}
            milliseconds: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(ROUNDS + 2):
                for name, graph in recorded.items():
                    took = elapsed(graph) / TURNS
                    if turn >= 2:
                        milliseconds[name].append(took)
            times = {name: summary(values) for name, values in milliseconds.items()}
    head = 2 * WANTED * model.config.width * model.config.padded_vocab_size
    return {
        "model": label,
        "blocks": model.config.num_blocks,
        "width": model.config.width,
        "batch": batch,
        "length": length,
        "floor_ms": 1e3 * batch * (model.flops(length, WANTED) - head) / RATE,
        "ms": {name: timing.as_dict() for name, timing in times.items()},
    }


def whole_runs(model: DiT, samples: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of `mdkern.sample` in both ways. Graphs of the one way must not serve the other."""
    run = partial(mdkern.sample, model, num_samples=samples, length=length, steps=length, progress=False)
    times: dict[str, list[float]] = {}
    for name, way in ((OURS, nullcontext), (OPERATORS, by_operators)):
        graphs.clear()
        with way():
            for seed in range(2):
                run(seed=seed)
            times[name] = []
            for seed in range(rounds):
                began = time.perf_counter()
                run(seed=seed)
                times[name].append(time.perf_counter() - began)
    graphs.clear()
    return {"samples": samples, "length": length, "seconds": times}


def measure(folder: Path, tiny: bool) -> dict[str, Any]:
    """Everything, written to the folder as it is measured."""
    if tiny:
        model = DiT(TINY).eval().requires_grad_(False)
        cases = [("a small one", model, 2, 16)]
        runs: tuple[DiT, int, int, int] = (model, 2, 16, 2)
    else:
        heavy, light, _ = mdkern.load_pair("cuda")
        paper = DiT(PAPER).to("cuda", torch.bfloat16).eval().requires_grad_(False)
        cases = [("shipped, heavy", heavy, batch, 256) for batch in (1, 4, 16, 32, 64)]
        cases += [("shipped, light", light, 16, 256)]
        cases += [("the paper's size", paper, batch, 1024) for batch in (1, 2)]
        runs = heavy, 16, 256, 7
    content: dict[str, Any] = {"environment": host_environment() if tiny else environment(), "passes": [], "failed": []}
    for case in cases:
        content["passes"].append(one_pass(*case))
        print(json.dumps(content["passes"][-1]), flush=True)
    content["runs"] = whole_runs(*runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "small-passes.json", json.dumps(content, indent=1) + "\n")
    return content


def table(content: dict[str, Any]) -> str:
    """Passes, then whole runs."""
    known = content["environment"]
    text = (
        f"{caption(content) if 'triton' in known else known['device']}. Milliseconds of a pass without its output"
        f" layer, the last block at {WANTED} rows a text; medians. Floor: the arithmetic at"
        f" {RATE / 1e12:.0f} TFLOP/s.\n\n"
    )
    rows = [
        [
            f"{row['model']}: {row['blocks']} × {row['width']}",
            f"{row['batch']} × {row['length']:,}",
            *(f"{row['ms'][name]['median']:.3f}" for name in (MODULES, OPERATORS, OURS)),
            f"{row['ms'][OPERATORS]['median'] / row['ms'][OURS]['median']:.2f} ×",
            f"{row['floor_ms']:.3f}",
        ]
        for row in content["passes"]
    ]
    text += markdown(["model", "texts", MODULES, OPERATORS, OURS, "", "floor"], rows)
    runs = content["runs"]
    ours, before = (statistics.median(runs["seconds"][name]) for name in (OURS, OPERATORS))
    return text + (
        f"\n`mdkern.sample` of {runs['samples']} texts of {runs['length']} tokens in as many steps, all heavy:"
        f" {ours:.3f} s; {OPERATORS}: {before:.3f} s ({before / ours:.2f} ×).\n"
    )


def small_passes() -> str:
    """The table of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    return folder_command("bench_small_passes", __doc__ or "", measure, table, argv)


if __name__ == "__main__":
    raise SystemExit(main())
