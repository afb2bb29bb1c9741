"""Keyed random numbers: every draw is a function of (seed, sample, position, step, index) by Philox 4x32-10.

So a sample does not depend on batch size, batch order, tile sizes or the rest of the batch (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011). This is plain PyTorch, exact in int64; `triton_noise` draws the same
numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
DOMAIN_SHIFT = 28  # the last counter word is (index >> 1) | domain << 28: vocabularies up to 2^29 ids

# The domain says what a number is drawn for. Draws of different domains never share a counter.
GROUP, TOKEN, PLAN, POSITION, TRANSITION, MASK_SIZE, MASK_PLACE, CANVAS = range(8)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10.

    Args:
        seed: int64 scalar; its two halves are the key.
        counter: four int64 tensors that broadcast together, read modulo 2^32.

    Returns:
        Four int64 tensors of the broadcast shape, each uniform on 0..2^32-1.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(word & WORD for word in counter))
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # may wrap past 2^63, which keeps the bits right
        c0, c1, c2, c3 = (
            ((product1 >> 32) & WORD) ^ c1 ^ key0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ c3 ^ key1,
            product0 & WORD,
        )
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def random_bits(
    seed: Tensor, sample: Tensor, position: Tensor, step: Tensor, index: Tensor, domain: int
) -> tuple[Tensor, Tensor]:
    """64 random bits for each draw, as two int64 tensors of 32 bits (high, low). One Philox call serves two indices."""
    words = philox(seed, (sample, position, step, (index >> 1) | (domain << DOMAIN_SHIFT)))
    odd = (index & 1).bool()
    return torch.where(odd, words[2], words[0]), torch.where(odd, words[3], words[1])


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """float64 in (0, 1) from 64 bits: ``(high * 2^32 + low + 1/2) / 2^64``, clamped below 1."""
    return ((high.double() + (low.double() + 0.5) * 2.0**-32) * 2.0**-32).clamp(max=1.0 - 2.0**-53)


def uniform_ids(seed: Tensor, sample: Tensor, position: Tensor, step: Tensor, vocab: int) -> Tensor:
    """int64 of the broadcast shape of the key tensors (int64), each uniform on 0..vocab-1 to within 2^-64."""
    high, low = random_bits(seed, sample, position, step, torch.zeros_like(sample), CANVAS)
    return (high * vocab + ((low * vocab) >> 32)) >> 32


def gumbel_from_bits(high: Tensor, low: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from 64 bits: ``-log(-log1p(-u))``.

    ``u`` in (0, 1) is finest near 0, the end that gives large noise: its smallest value is 2^-65 (noise 45). The usual
    ``-log(-log(u))`` with a 24-bit float ``u`` stops at 16.6, which in effect lowers the temperature (Zheng et al.,
    2409.02908). Only multiplications, one division and logarithms are used, so that every implementation agrees.
    """
    u = high.float() * 2.0**-32 + (low.float() + 0.5) * 2.0**-64
    u = u.clamp(max=1.0 - 2.0**-24)
    rest = 1.0 - u
    # log1p(-u) = log(rest) * u / (1 - rest), where the division undoes the rounding of rest.
    exponential = torch.where(rest == 1.0, u, -torch.log(rest) * (u / (1.0 - rest)))
    return -torch.log(exponential)


def gumbel(seed: Tensor, sample: Tensor, position: Tensor, step: Tensor, index: Tensor, domain: int) -> Tensor:
    """float32 Gumbel noise of the broadcast shape of the key tensors (int64)."""
    return gumbel_from_bits(*random_bits(seed, sample, position, step, index, domain))
