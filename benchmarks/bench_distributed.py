"""Samples drawn on 1, 2, 4, ... GPUs: the same samples, how much faster, and where the rest goes. Run by torchrun:

    torchrun --nproc-per-node 4 -m benchmarks.bench_distributed

Rank 0 draws all samples alone while the others wait; then the first two ranks draw their shares together, then the
first four, and so on up to all; the rounds take turns. A light model of the paper's size, random weights. Prints a line
for each number of processes and writes ``distributed.json`` to ``--out`` (``benchmarks/results`` on GPUs).
`python -m benchmarks.many_gpus` runs it with the other measurements of its kind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from benchmarks.harness import RESULTS, environment, write_text_whole
from mdkern import DiT, SampleOutput, sample
from mdkern.distributed import sample_distributed
from mdkern.profiling.profile import random_dit


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({*(1 << n for n in range(most.bit_length()) if 1 << n <= most), most})


@contextmanager
def first_ranks(store: dist.Store, name: str, rank: int, count: int) -> Iterator[None]:
    """The first `count` ranks as the default process group."""
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def timed(model: DiT, options: dict[str, Any]) -> tuple[float, SampleOutput]:
    """Seconds of the samples, and they: drawn by this process alone, or by all of the default process group."""
    draw = sample
    if dist.is_initialized():
        dist.barrier()
        draw = sample_distributed
    began = time.perf_counter()
    output = draw(model, progress=False, **options)
    if model.embedding.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, output


def share_seconds(output: SampleOutput) -> float:
    """Seconds of the slowest rank's share, without what the ranks exchange before and after it."""
    assert output.timings is not None
    return sum(seconds for name, seconds in output.timings.items() if name != "total")


def compare(
    model: DiT, options: dict[str, Any], rounds: int, store: dist.Store, rank: int, ranks: int
) -> dict[int, dict[str, Any]]:
    """For each number of processes the seconds of all rounds, after a run that compiles what has to be compiled.

    A rank that has no part in a measurement waits for the next one in which it has.
    """
    counts = counts_up_to(ranks)
    if rank:  # what rank 0 compiles, the others then find
        store.wait(["compiled"])
    sample(model, progress=False, **options | {"num_samples": min(16, options["num_samples"])})
    store.set("compiled", "yes")
    found: dict[int, dict[str, Any]] = {count: {"seconds": [], "share": [], "same": 1.0} for count in counts}
    expected: Any = None
    for turn in range(rounds):
        for count in counts:
            if rank >= count:
                continue
            with first_ranks(store, f"{turn} {count}", rank, count) if count > 1 else nullcontext():
                seconds, output = timed(model, options)
            drawn: Any = output.sequences
            expected = drawn if expected is None else expected
            run = found[count]
            run["seconds"].append(seconds)
            run["share"].append(share_seconds(output))
            run["same"] = min(run["same"], float((expected == drawn).all(-1).float().mean()))
    return found


def describe(found: dict[int, dict[str, Any]], num_samples: int) -> dict[str, dict[str, Any]]:
    """Medians, and what the lost time was spent on, in seconds."""
    runs: dict[str, dict[str, Any]] = {}
    alone = statistics.median(found[1]["seconds"])
    for count, run in found.items():
        seconds, share = statistics.median(run["seconds"]), statistics.median(run["share"])
        runs[str(count)] = run | {
            "median": seconds,
            "samples_per_second": num_samples / seconds,
            "ratio": alone / seconds,
            "efficiency": alone / seconds / count,
            "exchange": seconds - share if count > 1 else 0.0,
            "shares": (share if count > 1 else seconds) - alone / count,
        }
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.bench_distributed")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=50_258)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    store, rank, ranks = next(iter(rendezvous("env://")))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same weights on every rank
    size = {"vocab_size": arguments.vocab_size, "length": arguments.length, "width": arguments.width}
    model = random_dit(arguments.blocks, "cpu", heads=max(1, arguments.width // 64), **size)
    model = model.to(device, torch.bfloat16 if on_gpu else torch.float32)
    options = {name: getattr(arguments, name) for name in ("num_samples", "length", "steps")} | {"seed": 0}
    found = compare(model, options, arguments.rounds, store, rank, ranks)
    if rank == 0:
        runs = describe(found, arguments.num_samples)
        for count, run in runs.items():
            print(
                f"{count} processes: {run['median']:.3f} s, {run['samples_per_second']:.2f} samples/s, "
                f"{run['ratio']:.2f} x one, efficiency {run['efficiency']:.1%}; lost: {run['shares']:.3f} s in "
                f"smaller or uneven shares, {run['exchange']:.3f} s in exchanges; {run['same']:.1%} of the samples are "
                "the same",
                flush=True,
            )
        setting = {name: value for name, value in vars(arguments).items() if name != "out"}
        content = {"environment": environment(), **setting, "runs": runs}
        out = arguments.out or (RESULTS if on_gpu else None)
        if out is not None:
            write_text_whole(out / "distributed.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
