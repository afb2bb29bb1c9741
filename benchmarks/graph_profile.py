"""What the device does during a piece of work, kernel by kernel, from a profiler's trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Kinds = Sequence[tuple[str, Sequence[str]]]  # kinds of kernels and parts of their names; the first that fits


class Kernel(NamedTuple):
    name: str
    start: float  # microseconds
    end: float


def traced(run: Callable[[], object]) -> list[Kernel]:
    """The kernels of a run, and what it copies and fills."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def own_times(kernels: Sequence[Kernel]) -> list[tuple[str, float]]:
    """Name and microseconds of each kernel, in the order in which they begin, without the time in which an earlier one
    still ran. One that is launched early waits for the one before it, and does nothing else meanwhile."""
    found, reached = list[tuple[str, float]](), float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        found.append((kernel.name, max(0.0, kernel.end - max(kernel.start, reached))))
        reached = max(reached, kernel.end)
    return found


def busy_time(kernels: Sequence[Kernel]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    return sum(own for _, own in own_times(kernels))


def by_name(kernels: Sequence[Kernel], kinds: Kinds, runs: int) -> list[dict[str, Any]]:
    """Milliseconds a run of each kernel, as `own_times`, and its launches; those of most time first."""
    found = defaultdict[str, list[float]](list)
    for name, own in own_times(kernels):
        found[name].append(own)
    rows = [
        {"kernel": name[:100], "kind": kind_of(name, kinds), "ms": sum(us) / 1e3 / runs, "launches": len(us) / runs}
        for name, us in found.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def kind_of(name: str, kinds: Kinds) -> str:
    """Which kind a kernel belongs to."""
    return next(kind for kind, parts in kinds if any(part in name.lower() for part in parts))


def by_kind(rows: Sequence[dict[str, Any]], kinds: Kinds) -> dict[str, float]:
    """Milliseconds a run of each kind, from the rows of `by_name`."""
    return {kind: sum(row["ms"] for row in rows if row["kind"] == kind) for kind, _ in kinds}
