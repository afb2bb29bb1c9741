"""What keeping keys and values does to the text: the shipped heavy model with and without a block-wise cache.

    python -m benchmarks.bench_decoders_cache [--samples 8] [--length 256] [--steps 64] [--device cpu]

Prints, for each decoder and temperature, the share of tokens that differ from the run without a cache, in all of the
text and in its first block, forward passes, seconds, and the heavy model's own loss on the text. Once a token differs,
what follows is another text: the share is large even where the text is no worse, which the last column tells.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import mdkern
from mdkern import decoders

BLOCK_LENGTH = 32
CASES = [
    ("top_probability", decoders.TopProbability(), 0.0),
    ("top_probability", decoders.TopProbability(), 1.0),
    ("threshold 0.3", decoders.Threshold(0.3), 1.0),
]
COLUMNS = "decoder", "temp", "cache", "differ", "block 1", "passes", "seconds", "nats/token"


def masked_loss(model: mdkern.DiT, ids: Tensor) -> float:
    """Cross-entropy, nats a token, of every other token given the rest; over both halves."""
    even = torch.arange(ids.shape[1], device=ids.device) % 2 == 0
    losses = []
    with torch.no_grad():
        for hidden in (even, ~even):
            logits = model(torch.where(hidden, model.config.mask_id, ids))[:, hidden]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, hidden].flatten()))
    return float(torch.stack(losses).mean())


def disagreement(
    model: mdkern.DiT, decoder: decoders.Decoder, temperature: float, samples: int, length: int, steps: int
) -> list[tuple[str, ...]]:
    """For each cache, `COLUMNS` from there on."""
    rows, plain = [], None
    for cache in ("none", "prefix", "dual"):
        began = time.perf_counter()
        out = mdkern.sample(
            model, num_samples=samples, length=length, steps=steps, block_length=BLOCK_LENGTH, decoder=decoder,
            temperature=temperature, cache=cache, seed=0, progress=False,
        )  # fmt: skip
        took = time.perf_counter() - began
        assert out.sequences is not None
        assert out.nfe is not None
        plain = out.sequences if plain is None else plain
        differs = (out.sequences != plain).float()
        shares = (f"{100 * float(part.mean()):.1f} %" for part in (differs, differs[:, :BLOCK_LENGTH]))
        passes = f"{float(out.nfe['H'].float().mean()):.1f}"
        loss = f"{masked_loss(model, out.sequences):.3f}"
        rows.append((cache, *shares, passes, f"{took:.2f}", loss))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    model = mdkern.load_pair(arguments.device).heavy
    print("".join(f"{name:>17}" for name in COLUMNS), flush=True)
    sizes = arguments.samples, arguments.length, arguments.steps
    for name, decoder, temperature in CASES:
        for row in disagreement(model, decoder, temperature, *sizes):
            print("".join(f"{value:>17}" for value in (name, f"{temperature:g}", *row)), flush=True)


if __name__ == "__main__":
    main()
