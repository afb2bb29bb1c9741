"""Several GPUs beside one: the same samples, and how many times faster. Run by ``torchrun``, not by pytest:

    torchrun --nproc-per-node 2 -m benchmarks.bench_distributed

Rank 0 draws all samples alone while the others wait, then all draw their shares together; the rounds take turns. A
light model of the paper's size, random weights. Prints a line for each round and writes
``benchmarks/results/distributed.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import RESULTS, environment, write_text_whole
from mdkern import DiT, sample
from mdkern.distributed import sample_distributed
from mdkern.profiling.profile import random_dit

ROUNDS = 3


def timed(model: DiT, options: dict[str, Any], together: bool) -> tuple[float, torch.Tensor | None]:
    """Seconds that rank 0 sees, and its samples: drawn by it alone, or by all ranks."""
    dist.barrier()
    began = time.perf_counter()
    output = None
    if together:
        output = sample_distributed(model, progress=False, **options)
    elif dist.get_rank() == 0:
        output = sample(model, progress=False, **options)
    if model.embedding.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, None if output is None else output.sequences


def compare(model: DiT, options: dict[str, Any]) -> dict[str, Any]:
    """The rounds, after one of each kind that compiles what has to be compiled."""
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    same = []
    for turn in range(ROUNDS + 1):
        alone, expected = timed(model, options, together=False)
        together, found = timed(model, options, together=True)
        if dist.get_rank() == 0:
            assert expected is not None
            assert found is not None
            same.append(float((expected == found).all(-1).float().mean()))
            note = "warm-up" if turn == 0 else f"round {turn}"
            ratio = alone / together
            print(
                f"{note}: alone {alone:.3f} s, together {together:.3f} s, {ratio:.2f} x; {same[-1]:.1%} of the samples "
                "are the same",
                flush=True,
            )
        if turn:
            seconds["alone"].append(alone)
            seconds["together"].append(together)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "ratio": median["alone"] / median["together"], "same": min(same, default=None)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun -m benchmarks.bench_distributed")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=50_258)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same weights on every rank
    size = {"vocab_size": arguments.vocab_size, "length": arguments.length, "width": arguments.width}
    model = random_dit(arguments.blocks, "cpu", heads=max(1, arguments.width // 64), **size)
    model = model.to(device, torch.bfloat16 if on_gpu else torch.float32)
    options = {name: getattr(arguments, name) for name in ("num_samples", "length", "steps")} | {"seed": 0}
    result = compare(model, options)
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(f"{ranks} processes: {result['ratio']:.2f} times as fast as one", flush=True)
        content = {"environment": environment(), "processes": ranks, **vars(arguments), **result}
        if on_gpu:
            write_text_whole(RESULTS / "distributed.json", json.dumps(content, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
