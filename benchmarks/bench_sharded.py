"""The output layer with its vocabulary divided over 2, 4, ... GPUs, its exchange included, beside one GPU. By torchrun:

    torchrun --nproc-per-node 4 -m benchmarks.bench_sharded

Times are of replays of CUDA graphs with an empty L2 cache, the GPUs aligned before each, the slowest GPU's; contenders
take turns. The tokens of all are compared. Prints a line for each number of rows and writes ``sharded.json`` to
``--out`` (``benchmarks/results`` on GPUs). `python -m benchmarks.many_gpus` runs it with
the others of its kind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bench_distributed import counts_up_to
from benchmarks.harness import FLUSH_MEGABYTES, RESULTS, GpuTimer, environment, summary, write_text_whole
from mdkern.kernels import RowStatistics, vocab_projection
from mdkern.kernels.head.sharded import shard_of, vocab_projection_sharded
from mdkern.models.shard import ALL_GATHER

# LLaDA-8B's output layer, Gemma 3's, and the one of FlashSampling's published figures.
SHAPES = ((126_464, 4096), (262_144, 2816), (128_256, 8192))
ROWS = (1, 16, 64, 256, 1024)
# Microseconds that FlashSampling (2603.15854) publishes for V = 128,256, D = 8,192 on B200, by GPUs and rows; means
# of four or five runs, from imgs/tp-scaling/tp-scaling-runs-summary.csv in its repository. Tokens alone, no statistics.
PUBLISHED = {
    1: {16: 337.88, 64: 348.64, 256: 718.25},
    2: {16: 203.82, 64: 215.94, 256: 372.66},
    4: {16: 126.56, 64: 136.95, 256: 209.97},
    8: {16: 110.13, 64: 117.00, 256: 173.34},
}
TURNS, ROUNDS = 8, 11
COMPARED = 32  # calls whose tokens are compared, for each shape and number of rows


class Layer:
    """One output layer on every rank, and calls of it whole and in shards."""

    def __init__(self, vocab: int, depth: int, rows: int, device: torch.device) -> None:
        self.vocab, self.device = vocab, device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(vocab)
        self.weight = torch.randn(vocab, depth, generator=generator, device=device, dtype=dtype) * depth**-0.5 * 2.0
        self.bias = torch.zeros(vocab, device=device)
        self.bias[-1] = -torch.inf
        self.hidden = torch.randn(rows, depth, generator=generator, device=device, dtype=dtype)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)

    def arguments(self, rows: int) -> tuple[Any, ...]:
        index = torch.arange(rows, device=self.device)
        return index, torch.ones(rows, device=self.device), self.seed, torch.stack((index, index, index * 0), 1)

    def whole(self, rows: int) -> Callable[[], RowStatistics]:
        layer = self.hidden, self.weight, self.bias
        return partial(vocab_projection, *layer, *self.arguments(rows), want_top=True, want_entropy=True)

    def shard(self, rows: int, rank: int, count: int, exchange: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        part = slice(*shard_of(self.vocab, rank, count))
        return partial(
            vocab_projection_sharded,
            self.hidden,
            self.weight[part],
            self.bias[part],
            *self.arguments(rows),
            first=part.start,
            exchange=exchange,
            want_top=True,
            want_entropy=True,
        )


def exchange_over(group: Any, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def exchange(records: torch.Tensor) -> torch.Tensor:
        gathered = records.new_empty((count, *records.shape))
        ALL_GATHER(gathered.flatten(0, 1), records, group=group)
        return gathered

    return exchange


def compile_together(layer: Layer, rows: tuple[int, ...]) -> None:
    """Each rank compiles the kernels of some numbers of rows; the others find them in the compiler's cache."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    jobs = [run for count in rows for run in (layer.whole(count), layer.shard(count, 0, 2, lambda x: x[None]))]
    for run in jobs[rank::ranks]:
        run()
    dist.barrier()
    for run in jobs:
        run()
    dist.barrier()


class Clock:
    """Milliseconds of a contender, by graphs on a GPU. Every rank takes part in every measurement."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.timer = device, GpuTimer() if device.type == "cuda" else None
        self.token = torch.zeros(1, device=device)

    def prepare(self, run: Callable[[], object]) -> Callable[[], object]:
        return run if self.timer is None else self.timer.graph(run, TURNS).replay

    def measure(self, ready: Callable[[], object] | None) -> float:
        """Of the slowest rank; a rank without a part in it only waits."""
        dist.all_reduce(self.token)
        took = 0.0
        if ready is not None and self.timer is not None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            ready()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end) / TURNS
        elif ready is not None:
            began = time.perf_counter()
            ready()
            took = 1e3 * (time.perf_counter() - began)
        slowest = torch.tensor([took], device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)


def compare(layer: Layer, rows: int, groups: dict[int, Any], clock: Clock, rounds: int) -> dict[str, Any]:
    """Times of one GPU and of each group, and how many of their tokens differ from one GPU's."""
    rank = dist.get_rank()
    contenders: dict[int, Any] = {1: layer.whole(rows)}
    for count, group in groups.items():
        mine = rank < count
        contenders[count] = layer.shard(rows, rank, count, exchange_over(group, count)) if mine else None
    differing, furthest = dict.fromkeys(groups, 0), dict.fromkeys(groups, 0.0)
    for call in range(COMPARED):
        layer.seed.fill_(call)
        expected = contenders[1]()
        for count in groups:
            if contenders[count] is not None:
                got = contenders[count]()
                differing[count] += int((got.token != expected.token).sum())
                furthest[count] = max(furthest[count], float((got.logsumexp - expected.logsumexp).abs().max()))
    ready = {count: None if run is None else clock.prepare(run) for count, run in contenders.items()}
    nothing = clock.prepare(lambda: None)
    times: dict[int, list[float]] = {count: [] for count in ready}
    for turn in range(rounds + 1):
        base = clock.measure(nothing)
        for count, run in ready.items():
            took = clock.measure(run) - base
            if turn:
                times[count].append(took)
    medians = {count: statistics.median(values) for count, values in times.items()}
    return {
        "rows": rows,
        "ms": {str(count): summary(values).as_dict() for count, values in times.items()},
        "ratio": {str(count): medians[1] / medians[count] for count in groups},
        "tokens_compared": COMPARED * rows,
        "tokens_differing": {str(count): number for count, number in differing.items()},
        "logsumexp_difference": {str(count): value for count, value in furthest.items()},
    }


def run(shapes: list[tuple[int, int]], rows: tuple[int, ...], rounds: int, device: torch.device) -> list[Any]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    counts = counts_up_to(dist.get_world_size())[1:]
    groups = {count: dist.new_group(range(count), backend=backend) for count in counts}
    clock, table = Clock(device), []
    for vocab, depth in shapes:
        layer = Layer(vocab, depth, max(rows), device)
        compile_together(layer, rows)
        for count in rows:
            entry = {"columns": vocab, "depth": depth} | compare(layer, count, groups, clock, rounds)
            table.append(entry)
            if dist.get_rank() == 0:
                times = ", ".join(f"{gpus} GPUs {1e3 * ms['median']:.0f} µs" for gpus, ms in entry["ms"].items())
                print(
                    f"V = {vocab:,}, D = {depth:,}, M = {count:,}: {times}; tokens that differ: "
                    f"{entry['tokens_differing']} of {entry['tokens_compared']:,}",
                    flush=True,
                )
        del layer
    return table


def shape_of(text: str) -> tuple[int, int]:
    vocab, depth = text.split("x")
    return int(vocab), int(depth)


def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.bench_sharded")
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="VxD", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", metavar="M", default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    table = run(arguments.shapes, tuple(arguments.rows), arguments.rounds, device)
    if dist.get_rank() == 0:
        content = {
            "environment": environment(),
            "processes": dist.get_world_size(),
            "flushed_megabytes": FLUSH_MEGABYTES,
            "published_microseconds": PUBLISHED,
            "table": table,
        }
        out = arguments.out or (RESULTS if on_gpu else None)
        if out is not None:
            write_text_whole(out / "sharded.json", json.dumps(content, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
