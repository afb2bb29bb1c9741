"""`select` beside the chain of torch operations that it replaces, for each rule.

    pytest benchmarks/bench_select.py --benchmark-only

With ``--keep-results`` it writes ``benchmarks/results/select.json`` and ``select-cpu.json``. On a GPU both are timed
inside CUDA graphs; the chain is written without a synchronisation, as it must be to be captured at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import GpuTimer, compare_on_host, environment, host_environment, write_text_whole
from mdkern.kernels import select

SIZES = [(sequences, entries) for sequences in (1, 16, 128) for entries in (128, 1024, 4096)] + [(16, 32_768)]
BOUNDS = {"top_k": 0.0, "threshold": 0.9, "factor": 1.0, "entropy_bound": 0.1}


class Problem:
    def __init__(self, sequences: int, entries: int, device: str) -> None:
        size = (sequences, entries)
        self.scores = torch.rand(size, device=device)
        self.candidates = torch.rand(size, device=device) < 0.5
        self.tokens = torch.randint(0, 50_000, size, device=device)
        self.input_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.quota = torch.full((sequences,), entries // 16, device=device)

    def ours(self, rule: Any) -> Tensor:
        return select(
            self.scores,
            self.candidates,
            self.tokens,
            self.input_ids,
            rule,
            quota=self.quota if rule == "top_k" else None,
            bound=BOUNDS[rule],
        )

    def chain(self, rule: str) -> Tensor:
        """The same with torch: sort, rank, compare, write."""
        worth = -self.scores if rule == "entropy_bound" else self.scores
        worth = torch.where(self.candidates, worth, -torch.inf)
        best_first, order = worth.sort(dim=-1, descending=True, stable=True)
        place = torch.arange(1, worth.shape[1] + 1, device=worth.device)
        if rule == "top_k":
            passes = place <= self.quota[:, None]
        elif rule == "threshold":
            passes = (best_first >= BOUNDS[rule]) | (place == 1)
        elif rule == "factor":
            passes = ((place + 1) * (1 - best_first) < BOUNDS[rule]) | (place == 1)
        else:
            entropy = torch.where(best_first.isinf(), 0.0, -best_first)
            passes = entropy.cumsum(-1) - entropy <= BOUNDS[rule]
        chosen = torch.zeros_like(self.candidates).scatter_(1, order, passes) & self.candidates
        self.input_ids.copy_(torch.where(chosen, self.tokens, self.input_ids))
        return chosen


@pytest.mark.benchmark(group="select")
def test_on_gpu(benchmark: Any, results: Path) -> None:
    """Every rule and size; the number that the benchmark itself shows is ours for 16 sequences of 1,024, `top_k`."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels' benchmark is skipped")
    timer = GpuTimer()
    table: list[dict[str, Any]] = []
    for sequences, entries in SIZES:
        problem = Problem(sequences, entries, "cuda")
        for rule in BOUNDS:
            runs: dict[str, Callable[[], object]] = {
                "mdkern": partial(problem.ours, rule),
                "torch": partial(problem.chain, rule),
            }
            times = timer.compare(runs)
            row = {"sequences": sequences, "entries": entries, "rule": rule}
            table.append({**row, "ms": {name: timing.as_dict() for name, timing in times.items()}})
        if (sequences, entries) == (16, 1024):
            benchmark.pedantic(timed, args=(problem,), rounds=20, warmup_rounds=3)
        record = {"environment": environment(), "table": table}
        write_text_whole(results / "select.json", json.dumps(record, indent=1) + "\n")
    benchmark.extra_info["table"] = table
    assert all(row["ms"]["mdkern"]["median"] < row["ms"]["torch"]["median"] for row in table)


def timed(problem: Problem) -> None:
    problem.ours("top_k")
    torch.cuda.synchronize()


@pytest.mark.benchmark(group="select, CPU")
def test_on_cpu(benchmark: Any, results: Path) -> None:
    """The reference that runs without a GPU, for 16 sequences of 1,024."""
    problem = Problem(16, 1024, "cpu")
    table = []
    for rule in BOUNDS:
        times = compare_on_host({"mdkern": partial(problem.ours, rule), "torch": partial(problem.chain, rule)}, 21)
        milliseconds = {name: timing.as_dict() for name, timing in times.items()}
        table.append({"sequences": 16, "entries": 1024, "rule": rule, "ms": milliseconds})
        print(
            f"select on the CPU, {rule}: " + ", ".join(f"{n} {t.median:.2f} ms" for n, t in times.items()), flush=True
        )
    record = {"environment": host_environment(), "table": table}
    write_text_whole(results / "select-cpu.json", json.dumps(record, indent=1) + "\n")
    benchmark.pedantic(problem.ours, args=("top_k",), rounds=20)
