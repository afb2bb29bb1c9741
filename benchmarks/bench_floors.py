"""How far mdkern's passes are from what the libraries' bare products and attention take, where speed targets were set.

    python -m benchmarks.bench_floors FOLDER              # one GPU of 80 GB, a minute; writes FOLDER/floors.json
    python -m benchmarks.bench_floors FOLDER --parts pair # one setting; --anew measures again what is there
    python -m benchmarks.bench_floors FOLDER --tiny       # small models on a CPU, to try it out

Of each setting, in one run: a pass of mdkern, output layer and sampling included; the same products and the same
attention by the fastest of PyTorch's libraries, and nothing else (`benchmarks.bare`); the arithmetic of these, and
reading their weights, at the rates of an H200. The first two are CUDA graphs that take turns, for seconds where the
card gets to its power limit. A target of a whole run, such as a multiple of the eager loop's speed, is divided by the
run's passes, as if nothing else took time. A second table has the kernels of mdkern's pass, from a profiler's trace.
All weights but the shipped pair's are random.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import mdkern
from benchmarks import bench_people, paper_setting
from benchmarks.bare import Bare, Work, dit_work, llama_work
from benchmarks.graph_profile import busy_time, by_kind, by_name, traced
from benchmarks.harness import (
    RESULTS,
    captured,
    compare_on_host,
    environment,
    folder_command,
    host_environment,
    measure_parts,
    seconds,
    summary,
    sustained,
)
from benchmarks.kernel_tables import caption, markdown
from benchmarks.paper_setting import HEAVY
from benchmarks.tick_trace import few_masked
from mdkern import Denoiser, DiT, SampleOutput, adapt
from mdkern.engine import graphs
from mdkern.engine.capture import rehearse
from mdkern.kernels.head.vocab_projection import vocab_projection
from mdkern.profiling.profile import Setting

RATE, FP8_RATE, BANDWIDTH = 750e12, 1400e12, 4.28e12  # FLOP/s of large products and bytes/s of an H200
WANTED = 8  # positions a text at which the last block of a DiT runs: the most that a step reveals, but for rare ones
OURS, LIBRARIES = "mdkern", "libraries"
TRACED = 3  # replays
KINDS = (  # of kernels, by parts of their names; the first that fits
    ("output layer, sampling", ("vocab_projection",)),
    ("attention", ("sdpa", "flash", "fmha", "attention")),
    ("norms, rotation, rounding", ("norm", "rotary", "place_heads", "swiglu", "quantise", "gather")),
    ("products", ("linear", "resident", "joint", "product", "skinny", "gemm", "nvjet", "cutlass", "splitk", "cublas")),
    ("other kernels", ("",)),
)
KEPT = RESULTS / "floors.json"
ABSENT = "Not measured yet.\n"


@dataclass(frozen=True)
class Size:
    paper: paper_setting.Size = field(default_factory=lambda: paper_setting.Size(steps=8))
    pair: Setting = field(default_factory=lambda: Setting(16, 256, 256))
    llama: dict[str, Any] = field(default_factory=lambda: bench_people.LLADA_8B)
    given: tuple[int, int] = (512, 2048)
    written: int = 256
    hot: float = 3.0  # seconds of replays where the card gets to its power limit
    cool: float = 0.8  # and elsewhere


TINY = Size(
    paper_setting.Size(Setting(2, 16, 8), (2, 1), 50, 64, 1, 16, 1, 2, "eager"),
    Setting(2, 16, 8), bench_people.SMALL, (16, 32), 32,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Milliseconds of a pass that were aimed at, and in words why so many."""

    ms: float
    why: str


@dataclass(frozen=True)
class Subject:
    """A setting."""

    label: str
    denoiser: Denoiser  # prepared for the pass
    batch: int
    length: int
    wanted: int  # positions of each text that the last block runs
    rows: int  # of the output layer, of all texts
    work: Work
    warm: Callable[[], object]  # a short run, which compiles and captures
    run: Callable[[], SampleOutput]
    runs: int  # how many are timed
    target: Callable[[int], Target]  # of the number of passes of a run
    hot: bool

    def one_pass(self) -> Callable[[], object]:
        """Backbone, output layer and sampling."""
        device, head = self.denoiser.device, self.denoiser.head
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.denoiser.mask_id, (self.batch, self.length), generator=generator).to(device)
        positions = torch.arange(self.wanted, device=device).expand(self.batch, -1).contiguous()
        room = 1 << max(2, (self.rows - 1).bit_length())
        row = torch.arange(room, device=device) % (self.batch * self.wanted)
        keys, temperature = torch.zeros(room, 3, dtype=torch.int64, device=device), torch.ones(room, device=device)
        count, seed = (torch.tensor(value, device=device) for value in (self.rows, 0))

        def run() -> object:
            hidden = self.denoiser.hidden(ids, None, positions).flatten(0, 1)
            shaping: dict[str, Any] = {"row_count": count, "scale": head.scale, "soft_cap": head.soft_cap}
            return vocab_projection(hidden, head.weight, head.bias, row, temperature, seed, keys, **shaping)

        return run


class Subjects:
    """All settings of a size. Models are made when they are first needed."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.made: dict[str, Subject] = {}
        self.plain_ms: dict[int, float] = {}  # of a step of the plain loop, by the number of given tokens
        self.makers: dict[str, Callable[[], Subject]] = {
            "paper": partial(self.paper, 12.5),
            "paper-fp8": partial(self.paper, 17.0, "fp8"),
            "one-text": self.one_text,
            "pair": self.pair,
        }
        for name, given in zip(("long", "longer"), size.given):
            self.makers[name] = partial(self.llama, given)
            self.makers[f"{name}-fp8"] = partial(self.llama, given, "fp8")

    def __getitem__(self, part: str) -> Subject:
        if part not in self.made:
            self.made[part] = self.makers[part]()
        return self.made[part]

    @cached_property
    def bench(self) -> paper_setting.Bench:
        return paper_setting.Bench(self.size.paper, self.device)

    @cached_property
    def eager(self) -> float:
        """Seconds of a run of the paper's setting by the loop of MDLM's code."""
        run: float = self.bench.eager(HEAVY, self.size.paper.setting, self.size.paper.steps)["run"]
        return run

    @cached_property
    def shipped(self) -> DiT:
        return mdkern.load_pair(self.device).heavy

    @cached_property
    def people(self) -> tuple[Any, dict[str | None, Denoiser]]:
        """The Llama, and its denoisers by precision."""
        model, denoiser = bench_people.bidirectional_llama(self.size.llama, self.device.type)
        return model, {None: denoiser, "fp8": adapt(model, mask_id=denoiser.mask_id, precision="fp8")}

    def dit(
        self, label: str, model: DiT, setting: Setting, target: Callable[[int], Target], precision: str | None,
        runs: int, hot: bool,
    ) -> Subject:  # fmt: skip
        denoiser: Any = adapt(model, precision=precision).prepared(setting.batch_size * setting.length)
        # About 5 of 8 tokens get a step of their own where there are as many steps as tokens.
        batch, rows = setting.batch_size, max(1, round(1.6 * setting.batch_size))
        wanted = min(WANTED, setting.length)
        table = denoiser.folds is not None and denoiser.folds.qkv is not None
        work = dit_work(model.config, batch, setting.length, wanted, rows, fp8=precision is not None, table=table)
        own = adapt(model, precision=precision)
        run = partial(
            mdkern.sample, own, num_samples=batch, length=setting.length, steps=setting.steps, batch_size=batch, seed=0,
            progress=False,
        )  # fmt: skip
        return Subject(
            f"{label}: {model.config.num_blocks} × {model.config.width}", denoiser, batch, setting.length, wanted, rows,
            work, partial(mdkern.sample, own, **few_masked(model, setting, batch, max(100, setting.steps // 4))),
            run, runs, target, hot,
        )  # fmt: skip

    def paper(self, times: float, precision: str | None = None) -> Subject:
        def target(passes: int) -> Target:
            return Target(1e3 * self.eager / times / passes, f"{times:g} × the eager loop")

        setting = self.size.paper.setting
        return self.dit("the paper's", self.bench.half[HEAVY], setting, target, precision, 1, True)

    def one_text(self) -> Subject:
        def target(passes: int) -> Target:
            return Target(0.45, "0.45 ms a pass")

        setting = replace(self.size.paper.setting, batch_size=1)
        return self.dit("the paper's", self.bench.half[HEAVY], setting, target, None, 1, False)

    def pair(self) -> Subject:
        def target(passes: int) -> Target:
            return Target(1e3 * 0.045 / passes, "0.045 s a run")

        return self.dit("the shipped", self.shipped, self.size.pair, target, None, 5, False)

    def llama(self, given: int, precision: str | None = None) -> Subject:
        """Without a cache, by LLaDA's rule, a step for each block."""
        model, denoisers = self.people
        written, block, sizes = self.size.written, bench_people.BLOCK, self.size.llama
        ids = bench_people.texts(denoisers[None], 1, given, written)
        steps = written // block

        def target(passes: int) -> Target:
            if given not in self.plain_ms:
                run = partial(bench_people.plain_run, model, denoisers[None], ids, steps)
                run()
                self.plain_ms[given] = 1e3 * seconds(run, self.device.type)[0] / steps
            return Target(self.plain_ms[given] / 4, "4 × the plain loop")

        run = partial(
            mdkern.sample, denoisers[precision], input_ids=ids, decoder="top_probability", steps=steps,
            block_length=block, batch_size=1, temperature=0.0, seed=0, progress=False,
        )  # fmt: skip
        return Subject(
            f"a Llama: {sizes['num_hidden_layers']} × {sizes['hidden_size']:,}", denoisers[precision].current(), 1,
            given + written, block, block, llama_work(sizes, 1, given + written, block, fp8=precision is not None), run,
            run, 1, target, False,
        )  # fmt: skip

    def compile_ahead(self, parts: Sequence[str]) -> None:
        """Make the models, and compile the kernels of all passes side by side."""
        if self.device.type != "cuda":
            return
        began, runs = time.perf_counter(), list[Callable[[], object]]()
        for part in SETTINGS if KERNELS in parts else parts:
            with suppress(Exception):  # the part itself will meet it
                runs.append(self[part].one_pass())
        print(f"models: {time.perf_counter() - began:.1f} s", flush=True)

        def all_passes() -> None:
            for run in runs:
                run()

        device = torch.device("cuda", torch.cuda.current_device())
        with torch.no_grad():
            done, _ = rehearse(all_passes, lambda: None, torch.cuda.graph_pool_handle(), device)
        how = "side by side" if done is not None else "not side by side, as that failed"
        print(f"models and kernels, {how}: {time.perf_counter() - began:.1f} s", flush=True)


def timed_runs(subject: Subject) -> list[tuple[float, SampleOutput]]:
    """Whole runs. The first one does not count if it captured a graph."""
    subject.warm()
    held, timed = len(graphs.held()), list[tuple[float, SampleOutput]]()
    while len(timed) < subject.runs:
        timed.append(seconds(subject.run, subject.denoiser.device.type))
        if len(graphs.held()) > held:
            held = len(graphs.held())
            timed.clear()
    return timed


def passes_of(output: SampleOutput, batch: int) -> int:
    """Passes of a batch in a run, whose sequences may wait for each other."""
    assert output.nfe is not None
    counts = torch.stack(list(output.nfe.values())).sum(0)
    return max(int(counts.max()), -(-int(counts.sum()) // batch))


@torch.no_grad()
def measure_setting(subjects: Subjects, part: str) -> dict[str, Any]:
    subject, size = subjects[part], subjects.size
    device = subjects.device
    timed = timed_runs(subject)
    passes = passes_of(timed[0][1], subject.batch)
    target = subject.target(passes)
    ours, bare = subject.one_pass(), Bare(subject.work, device)
    found: dict[str, Any] = {
        "setting": subject.label,
        "texts": [subject.batch, subject.length],
        "fp8": any(item.fp8 for item in subject.work),
        "run": {"seconds": [took for took, _ in timed], "passes": passes},
        "target": vars(target),
        "flops": sum(item.flops for item in subject.work),
        "arithmetic_ms": 1e3 * sum(item.flops / (FP8_RATE if item.fp8 else RATE) for item in subject.work),
        "weights_ms": 1e3 * sum(item.weight_bytes for item in subject.work) / BANDWIDTH,
        "libraries": {str(item): ways for item, ways in bare.milliseconds.items()},
        "left_out": bare.left_out,
    }
    if device.type == "cuda":
        recorded = {OURS: captured(ours), LIBRARIES: captured(bare.run)}
        times = sustained(recorded, size.hot if subject.hot else size.cool)
        return found | {"ms": {name: summary(values).as_dict() for name, values in times.items()}}
    timings = compare_on_host({OURS: ours, LIBRARIES: bare.run}, 3)
    return found | {"ms": {name: timing.as_dict() for name, timing in timings.items()}}


@torch.no_grad()
def all_kernels(subjects: Subjects) -> dict[str, Any]:
    """The kernels of each pass, and the milliseconds of it in which none ran; nothing on a CPU.

    It comes last, as a process in which a profiler has been may launch more slowly.
    """
    found = {}
    for part in SETTINGS if subjects.device.type == "cuda" else ():
        graph = captured(subjects[part].one_pass())

        def replays(graph: torch.cuda.CUDAGraph = graph) -> None:
            for _ in range(TRACED):
                graph.replay()

        kernels = traced(replays)
        span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
        gaps = (span - busy_time(kernels)) / 1e3 / TRACED
        found[part] = {"kernels": by_name(kernels, KINDS, TRACED), "gaps_ms": gaps}
    return found


SETTINGS = tuple(Subjects(TINY, torch.device("cpu")).makers)
KERNELS = "kernels"
PARTS = (*SETTINGS, KERNELS)


def measure(folder: Path, tiny: bool, parts: Sequence[str], anew: bool) -> dict[str, Any]:
    """The parts, each written as soon as it is measured."""
    size, device = (TINY, torch.device("cpu")) if tiny else (Size(), torch.device("cuda"))
    known = host_environment() | {"triton": "–"} if tiny else environment()
    subjects = Subjects(size, device)
    jobs = {
        part: partial(all_kernels, subjects) if part == KERNELS else partial(measure_setting, subjects, part)
        for part in parts
    }
    return measure_parts(folder / "floors.json", {"environment": known}, jobs, anew, subjects.compile_ahead)


def table(content: dict[str, Any]) -> str:
    """Passes beside the floors, then where the time of mdkern's passes goes."""
    found = {part: content[part] for part in SETTINGS if part in content}
    text = (
        f"{caption(content)}. Milliseconds of a pass, medians. Target: what was aimed at, of a whole run divided by its"
        " passes; in brackets the share of a run that these take. Libraries: their bare products and attention."
        f" Arithmetic at {RATE / 1e12:,.0f} TFLOP/s, in e4m3 at {FP8_RATE / 1e12:,.0f}; weights read once at"
        f" {BANDWIDTH / 1e12:.2f} TB/s.\n\n"
    )
    body = []
    for row in found.values():
        ours, theirs = (row["ms"][name]["median"] for name in (OURS, LIBRARIES))
        target, run = row["target"], row["run"]
        shown = [target["ms"], ours, theirs, row["arithmetic_ms"], row["weights_ms"]]
        took = sorted(run["seconds"])[len(run["seconds"]) // 2]
        body.append(
            [
                name_of(row),
                target["why"],
                *(f"{ms:.3f}" for ms in shown),
                f"{ours / theirs:.2f} ×",
                f"{target['ms'] / theirs:.2f} ×",
                f"{took:.3f} s, {run['passes']} passes ({run['passes'] * ours / 1e3 / took:.0%})",
            ]
        )
    header = ["blocks × width, texts", "target", "a pass", "mdkern", "libraries", "arithmetic", "weights"]
    text += markdown([*header, "mdkern to libraries", "target to libraries", "a run by mdkern"], body)
    below = sum(row["target"]["ms"] < row["ms"][LIBRARIES]["median"] for row in found.values())
    text += f"\nTargets below what the libraries' bare products and attention take: {below} of {len(found)}.\n"
    profiles = {part: profile for part, profile in content.get(KERNELS, {}).items() if part in found}
    if not profiles:
        return text
    body = []
    for part, profile in profiles.items():
        sums = by_kind(profile["kernels"], KINDS)
        body.append([name_of(found[part]), *(f"{ms:.3f}" for ms in (*sums.values(), profile["gaps_ms"]))])
    text += "\nWhere the time of mdkern's pass goes, in milliseconds under a profiler:\n\n"
    return text + markdown([header[0], *(kind for kind, _ in KINDS), "no kernel"], body)


def name_of(row: dict[str, Any]) -> str:
    batch, length = row["texts"]
    return f"{row['setting']}, {batch} × {length:,}{', fp8' if row['fp8'] else ''}"


def floors() -> str:
    """The tables of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    return folder_command("bench_floors", __doc__ or "", measure, table, argv, PARTS)


if __name__ == "__main__":
    raise SystemExit(main())
