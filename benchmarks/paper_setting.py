"""The paper's setting (Sedykh et al., 2604.02340) on a GPU: what is measured, part by part.

16 sequences of 1,024 tokens in 1,000 steps, V = 50,258, width 768, 12 and 4 blocks, bfloat16, with random weights,
which take the time of trained ones. `mdkern.sample` is timed over whole runs. All steps of the two baselines are alike,
so some of them are timed, and a run is counted as so many median steps and the closing pass. Each part is a function
from the `Bench` to a value for the JSON; `benchmarks.bench_paper_setting` runs them, `benchmarks.paper_tables` shows
them.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, write_text_whole
from benchmarks.tick_trace import few_masked, trace_ticks
from mdkern import DiT, SampleOutput, Schedule, adapt, sample
from mdkern.engine import graphs
from mdkern.models.dit_denoiser import DiTDenoiser
from mdkern.output import counted_saving
from mdkern.profiling.compiled import Compiled, ddpm_compiled
from mdkern.profiling.profile import (
    Hollow,
    Setting,
    StepTimes,
    Unpadded,
    ddpm_autocast,
    random_dit,
    time_run,
    time_steps,
)

HEAVY, LIGHT = "H", "L"  # a model alone is "H"
PAPER = Setting(batch_size=16, length=1024, steps=1000)
SHARES = tuple(tenth / 10 for tenth in range(11))
PRODUCT = 8192  # size of the square product whose rate is taken as that of the card


@dataclass(frozen=True)
class Size:
    """Shape of the models and of the run; by default the paper's."""

    setting: Setting = PAPER
    blocks: tuple[int, int] = (12, 4)  # heavy, light
    vocab_size: int = 50_258
    width: int = 768
    heads: int = 12
    longest: int = 4096  # of the sequences in `other_sizes`
    runs: int = 3  # whole runs of mdkern
    steps: int = 20  # timed steps of a baseline
    backend: str = "inductor"  # of torch.compile


class Bench:
    """The models, made when they are first needed."""

    def __init__(self, size: Size, device: torch.device | str) -> None:
        self.size, self.device = size, torch.device(device)

    @cached_property
    def full(self) -> dict[str, DiT]:
        """In float32, for the eager baseline."""
        torch.manual_seed(0)
        shape = {"vocab_size": self.size.vocab_size, "width": self.size.width, "heads": self.size.heads}
        return {
            name: random_dit(blocks, self.device, length=self.size.longest, **shape)
            for name, blocks in zip((HEAVY, LIGHT), self.size.blocks)
        }

    @cached_property
    def half(self) -> dict[str, DiT]:
        """In bfloat16 on a GPU, for the others."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return {name: copy.deepcopy(model).to(dtype) for name, model in self.full.items()}

    def eager(self, name: str, setting: Setting, steps: int) -> dict[str, Any]:
        return baseline(time_steps(ddpm_autocast, Unpadded(self.full[name]), setting, steps), setting.steps)


def timed_runs(model: Any, setting: Setting, count: int) -> dict[str, Any]:
    """Whole runs with one model, after a first one that compiles kernels and captures graphs."""
    first, _ = time_run(model, setting)
    seconds, passes = [], 0.0
    for seed in range(count):
        took, output = time_run(model, setting, seed)
        assert output.nfe is not None
        seconds.append(took)
        passes = float(output.nfe[HEAVY].double().mean())
    return {"first": first, "seconds": seconds, "median": statistics.median(seconds), "passes": passes}


def baseline(times: StepTimes, steps: int) -> dict[str, Any]:
    """The results of a baseline: quartiles of a step and of its parts, and the seconds of a run of `steps` steps."""
    quartiles = dict(zip(("lower", "step", "upper"), statistics.quantiles(times.steps(), n=4)))
    parts = {"backbone": statistics.median(times.backbone), "head": statistics.median(times.head)}
    return {
        "timed_steps": len(times.head),
        "milliseconds": {name: 1e3 * value for name, value in (quartiles | parts).items()},
        "run": times.run(steps),
    }


def ours(bench: Bench) -> dict[str, Any]:
    """Whole runs, all heavy and all light."""
    return {name: timed_runs(model, bench.size.setting, bench.size.runs) for name, model in bench.half.items()}


def eager(bench: Bench) -> dict[str, Any]:
    """Steps of MDLM's sampler as its code runs it."""
    return {name: bench.eager(name, bench.size.setting, bench.size.steps) for name in bench.full}


def compiled(bench: Bench) -> dict[str, Any]:
    """Steps of the compiled baseline, as `torch.compile` makes it by default, and how long that took."""
    size = bench.size
    run = partial(ddpm_compiled, backend=size.backend)
    found: dict[str, Any] = {"mode": "default"}  # max-autotune takes too long to start beside the rest of the run
    for name in (LIGHT, HEAVY):
        denoiser = Compiled(bench.half[name], size.backend)
        began = time.perf_counter()
        time_steps(run, denoiser, size.setting, 1)
        startup = time.perf_counter() - began
        found[name] = baseline(time_steps(run, denoiser, size.setting, size.steps), size.setting.steps)
        found[name]["startup"] = startup
    return found


def inside(bench: Bench) -> dict[str, Any]:
    """The parts of a step of ours, with its arithmetic at the rate of a large product; the peak memory."""
    found: dict[str, Any] = {"product_tflops": product_rate(bench.device)}
    setting = bench.size.setting
    for name, model in bench.half.items():
        whole, headed = (
            timed_runs(variant, setting, 1)["median"]
            for variant in (model, Hollow(adapt(model), setting.batch_size, setting.length))
        )
        flops = setting.batch_size * (model.flops(setting.length, 1) - looked_up(model, setting))
        part = {"head_share": headed / whole, "arithmetic_ms": flops / found["product_tflops"] / 1e9}
        if bench.device.type == "cuda":
            part |= trace_ticks(model, setting) | peak_memory(bench, name)
        found[name] = part
    return found


def looked_up(model: DiT, setting: Setting) -> int:
    """FLOPs of a sequence's pass that are saved by reading a table."""
    folds = DiTDenoiser(model).prepared(setting.batch_size * setting.length).folds
    return 0 if folds is None or folds.qkv is None else 2 * setting.length * model.config.width * folds.qkv.shape[1]


def product_rate(device: torch.device) -> float:
    """TFLOP/s of a large square product in bfloat16."""
    side = PRODUCT if device.type == "cuda" else 64
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rounds = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(8):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(8 * 2 * side**3 / (time.perf_counter() - began) / 1e12)
    return statistics.median(rounds)


def peak_memory(bench: Bench, name: str) -> dict[str, float]:
    """MiB that a run takes beyond what is in memory before it, such as weights; graphs are captured anew."""
    graphs.clear()
    torch.cuda.synchronize(bench.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    allocated, reserved = torch.cuda.memory_allocated(bench.device), torch.cuda.memory_reserved(bench.device)
    time_run(bench.half[name], bench.size.setting)
    return {
        "peak_allocated_mib": (torch.cuda.max_memory_allocated(bench.device) - allocated) / 2**20,
        "peak_reserved_mib": (torch.cuda.max_memory_reserved(bench.device) - reserved) / 2**20,
        "weights_mib": sum(p.numel() * p.element_size() for p in bench.half[name].parameters()) / 2**20,
    }


def savings(bench: Bench) -> dict[str, Any]:
    """Runs at 0, 10, ..., 100 % light steps in a sandwich; the first is repeated at the end, to see the clock drift.

    Each schedule is run once before, so that its graphs are captured. A point is the median of several runs.
    """
    setting = bench.size.setting
    rows: list[dict[str, Any]] = []
    for share in (*SHARES, 0.0):
        schedule = Schedule.sandwich(share)
        time_run(bench.half, setting, schedule=schedule)
        runs = [time_run(bench.half, setting, schedule=schedule) for _ in range(bench.size.runs)]
        took = [seconds for seconds, _ in runs]
        row = {"share": share, "runs": took, "seconds": statistics.median(took)}
        rows.append(row | {"flops_saved": flops_saved(bench, runs[0][1])})
    whole = statistics.mean(row["seconds"] for row in rows if row["share"] == 0.0)
    for row in rows:
        row["clock_saved"] = 1.0 - row["seconds"] / whole
    points = [100 * abs(row["clock_saved"] - row["flops_saved"]) for row in rows]
    return {"rows": rows[:-1], "again": rows[-1], "largest_deviation_points": max(points)}


def flops_saved(bench: Bench, output: SampleOutput) -> float | None:
    """`SampleOutput.flops_saved`, also for runs without heavy steps, whose output does not know the heavy model."""
    assert output.nfe is not None
    assert output.tokens_per_forward is not None
    passes = dict.fromkeys(bench.half, torch.zeros_like(next(iter(output.nfe.values())))) | output.nfe
    denoisers = {name: adapt(model) for name, model in bench.half.items()}
    return counted_saving(denoisers, passes, output.tokens_per_forward, bench.size.setting.length)


def other_sizes(bench: Bench) -> dict[str, Any]:
    """Other batch sizes, lengths and numbers of steps, against the eager sampler."""
    usual = bench.size.setting
    cases = [
        (HEAVY, replace(usual, batch_size=1)),
        (LIGHT, replace(usual, batch_size=1)),
        (HEAVY, replace(usual, length=usual.length // 8)),
        (LIGHT, replace(usual, length=usual.length // 8)),
        (LIGHT, replace(usual, length=bench.size.longest, batch_size=max(1, usual.batch_size // 4))),
        (HEAVY, replace(usual, steps=max(1, usual.steps * 128 // 1000))),
        (LIGHT, replace(usual, steps=max(1, usual.steps * 128 // 1000))),
    ]
    rows = []
    for name, setting in cases:
        run = timed_runs(bench.half[name], setting, 2)
        slow = bench.eager(name, setting, max(4, bench.size.steps // 2))
        shape = {"batch_size": setting.batch_size, "length": setting.length, "steps": setting.steps}
        rows.append({"model": name, **shape, "mdkern": run, "eager": slow, "ratio": slow["run"] / run["median"]})
    return {"rows": rows}


def invariant(bench: Bench) -> dict[str, Any]:
    """All heavy with `batch_invariant=True` beside the default, in turns, at several batch sizes; nothing on a CPU."""
    if bench.device.type != "cuda":
        return {"rows": []}
    usual, model = bench.size.setting, bench.half[HEAVY]
    rows = list[dict[str, Any]]()
    for batch_size in sorted({1, max(1, usual.batch_size // 4), usual.batch_size}):
        setting = replace(usual, batch_size=batch_size, steps=max(1, usual.steps * 128 // 1000))
        seconds: dict[str, list[float]] = {"default": [], "invariant": []}
        for seed in range(-1, bench.size.runs):  # the first ones compile kernels and capture graphs
            for name, took in seconds.items():
                run, _ = time_run(model, setting, max(seed, 0), batch_invariant=name == "invariant")
                took += [run] * (seed >= 0)
        ratio = statistics.median(seconds["invariant"]) / statistics.median(seconds["default"])
        rows.append(
            {"batch_size": batch_size, "length": setting.length, "steps": setting.steps, "ratio": ratio, **seconds}
        )
    return {"rows": rows}


def scaling(bench: Bench) -> dict[str, Any]:
    """Seconds over the number of samples, light model; also for a number that leaves the last batch half empty.

    Graphs are captured before: with several batches by a short run of the same shapes.
    """
    usual, model = bench.size.setting, bench.half[LIGHT]
    rows = list[dict[str, Any]]()
    for count in (usual.batch_size * halves // 2 for halves in (2, 3, 8, 32)):
        many = count >= 4 * usual.batch_size
        if many:
            sample(model, **few_masked(model, usual, count))
        else:
            time_run(model, usual, samples=count)
        runs = 1 if many else bench.size.runs
        seconds = [time_run(model, usual, seed, samples=count)[0] for seed in range(runs)]
        rows.append({"samples": count, "seconds": seconds, "per_sample": statistics.median(seconds) / count})
    per_sample = {row["samples"]: row["per_sample"] for row in rows}
    return {
        "length": usual.length,
        "steps": usual.steps,
        "rows": rows,
        "first_over_last": per_sample[usual.batch_size] / per_sample[16 * usual.batch_size],
        "half_batch_waste": per_sample[usual.batch_size * 3 // 2] / per_sample[usual.batch_size] - 1.0,
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    part.__name__: part for part in (ours, eager, savings, inside, compiled, other_sizes, scaling, invariant)
}


def keep(path: Path, part: str, content: dict[str, Any], seconds: float) -> None:
    """Put a part into the file; parts that another card or version of PyTorch measured are dropped."""
    known = environment()
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if record.get("environment") != known:
        record = {"environment": known, "parts": {}}
    record["parts"][part] = content | {"took": seconds}
    write_text_whole(path, json.dumps(record, indent=1) + "\n")
