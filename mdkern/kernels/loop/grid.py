"""Numbers without rounding noise, as `select` compares and adds them: its reference and its kernel choose alike.

Positions that the model cannot tell apart, as in a text that is masked throughout, have the same score but for the last
bits, which depend on the batch size. On the grid below they are equal, and the lowest position is the first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP_BITS = 16  # of rounding: float32 scores that ought to be equal were up to 2^-20 of themselves apart


def steps_below_best(worth: Tensor, able: Tensor) -> Tensor:
    """``worth [B, R]``, float32 without NaN, on a grid that starts at the row's best and goes down.

    A step is 2^-16, times the largest power of two in the best if that is above 1. A best of less than half a step
    counts as 0. Rows whose best is infinite are left as they are.

    Args:
        worth: the larger the better.
        able: bool ``[B, R]``: the entries that the best is chosen from.
    """
    best = worth.masked_fill(~able, -torch.inf).amax(-1, keepdim=True)
    power = (best.view(torch.int32) & 0x7F800000).clamp(min=127 << 23)  # float32 by its bits
    step_bits = power - (STEP_BITS << 23)
    step, inverse = step_bits.view(torch.float32), ((254 << 23) - step_bits).view(torch.float32)
    anchor = torch.where(best.abs() < 0.5 * step, 0.0, best)
    below = ((best - worth) * inverse + 0.5).floor() * step
    return torch.where(best.isfinite(), anchor - below, worth)


def fixed_bound(bound: float) -> int:
    """`fixed_point` of a bound of sums; infinity is above every sum of 2^16 entropies."""
    return 1 << 62 if math.isinf(bound) and bound > 0 else int(fixed_point(torch.tensor(bound, device="cpu")))


def fixed_point(entropy: Tensor) -> Tensor:
    """Multiples of 2^-32, int64, so that sums do not depend on their order; held below 2^46."""
    return (entropy.double().clamp(-(2.0**14), 2.0**14) * 2.0**32 + 0.5).floor().long()
