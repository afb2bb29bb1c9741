"""Every decoder beside the loop that its public code runs: what is measured, part by part.

A part is a list of rows, each with a function that measures it. `benchmarks.bench_decoders` runs them and keeps every
row as soon as it is measured; `benchmarks.decoder_tables` shows them. mdkern is timed over whole runs. For a plain loop
at a large size, some steps are timed halfway, where half of the text is masked, and a run is counted as their median
times the method's number of steps. Random weights take the time of trained ones, but give other probabilities. So they
are drawn larger than for training (`make_model`), and the bounds of threshold, factor and entropy bound are set to
suit the model (`decoder_cases.Gauge`).
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cache_setting import cache_rows
from benchmarks.decoder_cases import Case, Gauge, run_ours
from benchmarks.harness import seconds
from benchmarks.plain_decoders import make_cases, threshold
from benchmarks.plain_loop import Plain, decode
from mdkern import DiT, DiTConfig, decoders, load_pair, sample
from mdkern.engine import graphs
from mdkern.models.dit import Block
from mdkern.profiling.eager import ddpm
from mdkern.profiling.profile import Clock, Setting, Unpadded, time_steps

JUDGE = Path(__file__).parent / "judge"
WARM_STEPS = 2
ENOUGH_SECONDS = 2.0  # after so many seconds of whole runs, no further one is begun
SPREAD = {"query": 3.0, "residual": 4.0, "logit": 7.0}  # see `make_model`
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The shape of a model with random weights, and of a run."""

    blocks: int
    width: int
    heads: int
    vocab_size: int
    mask_id: int
    length: int
    prompt: int  # number of tokens that are given
    steps: int  # T of decoders that have a number of steps
    block_length: int = 32  # block length of decoders that are published with blocks


@dataclass(frozen=True)
class Size:
    """All sizes, which tests make smaller."""

    paper: Shape = Shape(12, 768, 12, 50_258, 50_257, length=1024, prompt=64, steps=120)
    batch: int = 8
    llada: Shape = Shape(32, 4096, 32, 126_464, 126_336, length=256, prompt=128, steps=128)
    llada_batches: tuple[int, ...] = (1, 8)
    pair_length: int = 256
    pair_steps: int = 64
    pair_block: int = 32
    pair_samples: int = 16  # of the runs that are timed
    judged: int = 64  # samples of ours
    runs: int = 3
    timed_steps: int = 5


@torch.no_grad()
def make_model(shape: Shape, device: torch.device) -> DiT:
    """A model with random weights, made where it runs, bfloat16 on a GPU.

    With the weights that training starts from, every masked position gets the same nearly flat distribution. Here
    attention is sharp (queries and keys of standard deviation 3), sublayers add more to the residual stream (4 times),
    and logits have a standard deviation of 7, so that positions differ and some of them are sure.
    """
    config = DiTConfig(shape.vocab_size, shape.mask_id, None, shape.length, shape.blocks, shape.width, shape.heads)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = DiT(config).eval()
    finally:
        torch.set_default_dtype(usual)
    unit = 1.0 / math.sqrt(shape.width)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn_qkv.weight.normal_(std=SPREAD["query"] * unit)
        block.mlp_up.weight.normal_(std=unit)
        block.attn_out.weight.mul_(SPREAD["residual"])
        block.mlp_down.weight.mul_(SPREAD["residual"])
    model.head_weight.normal_(std=SPREAD["logit"] * unit)
    return model


def prompts(shape: Shape, batch: int, device: torch.device, given: int | None = None) -> Tensor:
    """Random tokens in the first `given` places, by default the shape's prompt, masks in the others."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.mask_id, (batch, shape.length), generator=generator)
    ids[:, shape.prompt if given is None else given :] = shape.mask_id
    return ids.to(device)


@torch.no_grad()
def measure_gauge(peer: Unpadded, ids: Tensor, block_length: int) -> Gauge:
    distribution = peer.logits(ids).softmax(-1)
    first = int((ids[0] == peer.mask_id).int().argmax())
    probability = distribution.amax(-1)[:, first : first + block_length]
    return Gauge.of(probability, torch.special.entr(distribution).sum(-1)[:, first:])


@dataclass
class Bench:
    """Models shared by the parts, made when first needed."""

    size: Size
    device: torch.device
    pair: Callable[[torch.device], Any] = load_pair

    @cached_property
    def judge(self) -> Any:
        from transformers import GPT2LMHeadModel

        judge: Any = GPT2LMHeadModel.from_pretrained(JUDGE, dtype=torch.float32)
        return judge.to(self.device).eval()


def time_ours(model: Any, case: Case, ids: Tensor, steps: int, runs: int, **more: Any) -> Row:
    """Whole runs, after a first one that compiles kernels and captures graphs."""
    first, _ = seconds(partial(run_ours, model, case, ids, steps, 0, **more), ids.device.type)
    times, passes = [], []
    for seed in range(runs):
        took, output = seconds(partial(run_ours, model, case, ids, steps, seed, **more), ids.device.type)
        times.append(took)
        passes.append(float(sum(output.nfe.values()).double().mean()))
        if sum(times) > ENOUGH_SECONDS:
            break
    wanted = int((ids == run_mask(model)).sum())
    return {
        "first": first,
        "seconds": times,
        "median": statistics.median(times),
        "passes": statistics.mean(passes),
        "tokens_per_second": wanted / statistics.median(times),
    }


def run_mask(model: Any) -> int:
    mask_id: int = model.config.mask_id
    return mask_id


def run_plain(
    peer: Unpadded, case: Case, ids: Tensor, steps: int, seed: int = 0, most: int | None = None, **watch: Any
) -> Tensor:
    """The case's plain loop."""
    if case.plain is None:
        return ddpm(peer, input_ids=ids, steps=steps, seed=seed)[0]
    settings: Row = {"block_length": case.block_length, "temperature": case.temperature, "most_steps": most}
    settings |= {"steps": steps, "mask_id": peer.mask_id, "seed": seed}
    return decode(peer.logits, ids, case.plain, **settings, **watch)


def time_plain_steps(peer: Unpadded, case: Case, ids: Tensor, steps: int, count: int) -> list[float]:
    """Seconds of each of `count` steps, after some to warm up. A loop that ends earlier is begun again."""
    if case.plain is None:
        return time_steps(ddpm, peer, Setting(ids.shape[0], ids.shape[1], steps), count, WARM_STEPS).steps()
    times: list[float] = []
    while len(times) < WARM_STEPS + count:
        clock = Clock(ids.device)
        most = WARM_STEPS + count - len(times)
        run_plain(peer, case, ids, steps, most=most, watch=lambda _, clock=clock: clock.mark("step"))
        clock.mark("end")
        times += clock.laps("step")
    return times[WARM_STEPS:]


def steps_of_plain(case: Case, steps: int, passes: float) -> float:
    """How many steps the plain loop takes: T, one more for `ddpm`, or as many as ours needed.

    A batch of the plain loop runs until its last sequence is finished, so this favours the plain loop.
    """
    if case.plain is None:
        return steps + 1
    return passes if case.plain.adaptive else steps


def size_rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """At the paper's size: ours whole, the plain loop from some of its steps."""
    shape, size = bench.size.paper, bench.size
    model = make_model(shape, bench.device)
    peer, ids = Unpadded(model), prompts(shape, size.batch, bench.device)
    wanted = shape.length - shape.prompt
    halfway = prompts(shape, size.batch, bench.device, given=shape.prompt + wanted // 2)
    gauge = measure_gauge(peer, ids, shape.block_length)

    def measure(case: Case) -> Row:
        ours = time_ours(model, case, ids, shape.steps, size.runs)
        steps = time_plain_steps(peer, case, halfway, shape.steps // 2, size.timed_steps)
        count = steps_of_plain(case, shape.steps, ours["passes"])
        quartiles = dict(zip(("lower", "median", "upper"), statistics.quantiles(steps, n=4)))
        run = count * quartiles["median"]
        loop = {"step": quartiles, "timed_steps": len(steps), "steps": count, "run": run}
        loop["tokens_per_second"] = size.batch * wanted / run
        return {**describe(case), "ours": ours, "plain": loop, "ratio": run / ours["median"]}

    vocabulary = shape.length, shape.vocab_size
    for case in make_cases(gauge, 0.0, *vocabulary, shape.block_length, bench.device):
        yield case.name, partial(measure, case)


def pair_rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The shipped pair's heavy model at temperature 1: passes, speed and quality, ours and the plain loop whole."""
    size = bench.size
    model = bench.pair(bench.device)[0]
    peer, config = Unpadded(model), model.config
    ids = torch.full((size.pair_samples, size.pair_length), config.mask_id, device=bench.device)

    def measure(case: Case) -> Row:
        ours = time_ours(model, case, ids, size.pair_steps, size.runs)
        judged = [
            run_ours(model, case, ids, size.pair_steps, 100 + turn).sequences
            for turn in range(-(-size.judged // size.pair_samples))
        ]
        run_plain(peer, case, ids, size.pair_steps, most=WARM_STEPS)
        took, theirs = seconds(partial(run_plain, peer, case, ids, size.pair_steps), bench.device.type)
        ours |= quality(bench, torch.cat(judged))
        loop = {"run": took, "tokens_per_second": ids.numel() / took, **quality(bench, theirs)}
        return {**describe(case), "ours": ours, "plain": loop, "ratio": took / ours["median"]}

    for case in make_cases(Gauge(), 1.0, size.pair_length, config.vocab_size, size.pair_block, bench.device):
        yield case.name, partial(measure, case)


def quality(bench: Bench, sequences: Tensor) -> Row:
    """Judge perplexity with its standard error, and the entropy of a sample's tokens in nats."""
    from mdkern.evaluation.text import judge, token_entropy

    nll = judge(bench.judge, sequences).nats_per_token()
    perplexity = math.exp(nll.mean())
    return {
        "samples": len(sequences),
        "perplexity": perplexity,
        "perplexity_error": perplexity * float(nll.std()) / math.sqrt(len(nll)),
        "token_entropy": float(token_entropy(sequences).mean()),
    }


def describe(case: Case) -> Row:
    numbers = {name: value for name, value in vars(case.ours).items() if isinstance(value, str | int | float)}
    block_length, temperature = case.block_length, case.temperature
    return {"source": case.source, "parameters": numbers, "block_length": block_length, "temperature": temperature}


def llada_rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """LLaDA-8B's shapes: a prompt continued in blocks by threshold, ours with and without a cache, and the loop."""
    shape, size = bench.size.llada, bench.size
    model = make_model(shape, bench.device)
    peer = Unpadded(model)
    gauge = measure_gauge(peer, prompts(shape, 1, bench.device), shape.block_length)
    loop = Plain(partial(threshold, bound=gauge.threshold), adaptive=True)
    case = Case("threshold", "Fast-dLLM", decoders.Threshold(gauge.threshold), loop, 0.0, shape.block_length)
    caches = ("dual", "none") if "cache" in inspect.signature(sample).parameters else ("none",)

    def measure_ours(batch: int, cache: str) -> Row:
        ids, more = prompts(shape, batch, bench.device), {} if len(caches) == 1 else {"cache": cache}
        row, peak = with_peak(bench, partial(time_ours, model, case, ids, shape.steps, size.runs, **more))
        return {**describe(case), "batch": batch, "way": f"mdkern, cache {cache}", **row, **peak}

    def measure_plain(batch: int) -> Row:
        ids = prompts(shape, batch, bench.device)
        run_plain(peer, case, ids, shape.steps, most=WARM_STEPS)
        clock = Clock(ids.device)
        run = partial(run_plain, peer, case, ids, shape.steps, watch=lambda _: clock.mark("step"))
        (took, _), peak = with_peak(bench, lambda: seconds(run, bench.device.type))
        speed = batch * (shape.length - shape.prompt) / took
        row = {"median": took, "passes": len(clock.marks), "tokens_per_second": speed, **peak}
        return {**describe(case), "batch": batch, "way": "plain loop", **row}

    for batch in size.llada_batches:
        for cache in caches:
            yield f"{batch}, {cache}", partial(measure_ours, batch, cache)
        yield f"{batch}, plain", partial(measure_plain, batch)


def with_peak(bench: Bench, run: Callable[[], Any]) -> tuple[Any, Row]:
    """The result of a run, and its peak of allocated memory in GiB, weights included; graphs are captured anew."""
    if bench.device.type != "cuda":
        return run(), {}
    graphs.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    result = run()
    return result, {"peak_gib": torch.cuda.max_memory_allocated(bench.device) / 2**30}


PARTS: dict[str, Callable[[Bench], Iterator[tuple[str, Callable[[], Row]]]]] = {
    "size": size_rows,
    "pair": pair_rows,
    "llada": llada_rows,
    "caches": cache_rows,
}


def run_part(
    bench: Bench, part: str, known: set[str], keep: Callable[[str, Row], None], until: float
) -> dict[str, str]:
    """Measure the rows of a part that are not `known`, handing each to `keep`; what failed or was left, and why.

    Args:
        until: `time.monotonic` at which no further row is begun.
    """
    left: dict[str, str] = {}
    for name, measure in PARTS[part](bench):
        if name in known:
            continue
        if time.monotonic() > until:
            left[name] = "no time left"
            continue
        try:
            keep(name, measure())
        except (RuntimeError, ValueError, FloatingPointError) as error:
            left[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return left
