"""Entropies as integers, as `select` adds them: its reference and its kernel admit the same entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fixed_bound(bound: float) -> int:
    """`fixed_point` of a bound of sums; infinity is above every sum of 2^16 entropies."""
    return 1 << 62 if math.isinf(bound) and bound > 0 else int(fixed_point(torch.tensor(bound, device="cpu")))


def fixed_point(entropy: Tensor) -> Tensor:
    """Multiples of 2^-32, int64, so that sums do not depend on their order; held below 2^46."""
    return (entropy.double().clamp(-(2.0**14), 2.0**14) * 2.0**32 + 0.5).floor().long()
