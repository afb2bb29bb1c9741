"""Rounding of scores before `select` compares or adds them, so that the choice does not depend on rounding errors.

In a text that is masked throughout, all positions should have the same score; in floating point they differ in the last
bits, and how depends on the batch size. Rounded to the grid below they are equal, and the lowest position comes first.
Measured differences: docs/notes/selection.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP_BITS = 16  # a step of the grid is 2^-16, see docs/notes/selection.md


def steps_below_best(worth: Tensor, able: Tensor) -> Tensor:
    """Round ``worth [B, R]``, float32 without NaN, to a grid that goes down in steps from the row's best.

    A step is 2^-16, times the largest power of two not above the best if that is more than 1. A best of less than half
    a step counts as 0. Rows whose best is infinite are not changed.

    Args:
        worth: scores, larger is better.
        able: bool ``[B, R]``: the entries among which the best is looked for.
    """
    best = worth.masked_fill(~able, -torch.inf).amax(-1, keepdim=True)
    power = (best.view(torch.int32) & 0x7F800000).clamp(min=127 << 23)  # float32 by its bits
    step_bits = power - (STEP_BITS << 23)
    step, inverse = step_bits.view(torch.float32), ((254 << 23) - step_bits).view(torch.float32)
    anchor = torch.where(best.abs() < 0.5 * step, 0.0, best)
    below = ((best - worth) * inverse + 0.5).floor() * step
    return torch.where(best.isfinite(), anchor - below, worth)


def fixed_bound(bound: float) -> int:
    """`fixed_point` of a bound on sums. Infinity becomes a number above every sum of 2^16 entropies."""
    return 1 << 62 if math.isinf(bound) and bound > 0 else int(fixed_point(torch.tensor(bound, device="cpu")))


def fixed_point(entropy: Tensor) -> Tensor:
    """Entropies as int64 multiples of 2^-32, clamped to below 2^46, so that sums do not depend on the order."""
    return (entropy.double().clamp(-(2.0**14), 2.0**14) * 2.0**32 + 0.5).floor().long()
