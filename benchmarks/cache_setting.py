"""The effect of a KV cache on the text: the shipped heavy model with and without a cache, in blocks.

A part of `benchmarks.bench_decoders`. Once one token differs from the run without a cache, the rest is another text. So
the share of tokens that differ is large even if the text is no worse; the model's own loss on the text tells that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoder_cases import Case, run_ours
from benchmarks.harness import seconds
from mdkern import DiT, decoders

Row = dict[str, Any]
CASES = {  # by name: decoder and temperature
    "top probability, greedy": (decoders.TopProbability(), 0.0),
    "top probability": (decoders.TopProbability(), 1.0),
    "threshold 0.3": (decoders.Threshold(0.3), 1.0),
}
CACHES = ("none", "prefix", "dual")


def masked_loss(model: DiT, ids: Tensor) -> float:
    """Cross-entropy, nats a token, of every other token given the rest; over both halves."""
    even = torch.arange(ids.shape[1], device=ids.device) % 2 == 0
    losses = []
    with torch.no_grad():
        for hidden in (even, ~even):
            logits = model(torch.where(hidden, model.config.mask_id, ids))[:, hidden]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, hidden].flatten()))
    return float(torch.stack(losses).mean())


def cache_rows(bench: Any) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Speed, forward passes, loss, and the share of tokens that differ from the run without a cache.

    `bench` is a `benchmarks.decoder_setting.Bench`.
    """
    size = bench.size
    model = bench.pair(bench.device)[0]
    nothing = torch.full((size.pair_samples, size.pair_length), model.config.mask_id, device=bench.device)
    plain: dict[str, Tensor] = {}

    def run(name: str, cache: str) -> Any:
        decoder, temperature = CASES[name]
        case = Case(name, "Fast-dLLM", decoder, None, temperature, size.pair_block)  # no plain loop is run
        return run_ours(model, case, nothing, size.pair_steps, 0, cache=cache)

    def measure(name: str, cache: str) -> Row:
        if name not in plain:
            plain[name] = run(name, "none").sequences
        run(name, cache)  # compiles kernels and captures graphs
        times, output = [], None
        for _ in range(size.runs):
            took, output = seconds(partial(run, name, cache), bench.device.type)
            times.append(took)
        assert output is not None
        differs = (output.sequences != plain[name]).float()
        return {
            "samples": size.pair_samples,
            "cache": cache,
            "seconds": times,
            "tokens_per_second": differs.numel() / statistics.median(times),
            "passes": float(sum(output.nfe.values()).double().mean()),
            "differ": float(differs.mean()),
            "differ_in_first_block": float(differs[:, : size.pair_block].mean()),
            "loss": masked_loss(model, output.sequences),
        }

    for name in CASES:
        for cache in CACHES:
            yield f"{name}, {cache}", partial(measure, name, cache)
