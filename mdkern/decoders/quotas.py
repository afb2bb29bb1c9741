"""How many positions are revealed at a step, for the decoders that take the best positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, View, even_quota
from mdkern.decoders.checks import check_choice, check_number


def dream_quota(view: View) -> Tensor:
    """Dream's quota (Ye et al., 2508.15487), int64 ``[B]``: ``int(masked (1 - s / t))`` for each sequence.

    t goes linearly from 1 to 0.001 over the block's steps, so that ``1 - s / t = 999 / (1000 steps - 999 step)``, which
    is exact in integers. At the block's last step the quota is all that is left. It is at least 1 while something is
    masked; Dream's own code may reveal nothing in a step, and then more in the last one.
    """
    left = view.masked.sum(-1)
    quota = left * 999 // (1000 * view.block_steps - 999 * view.block_step).clamp(min=1)
    return torch.where(view.block_step >= view.block_steps - 1, left, quota.clamp(min=1))


QUOTAS: dict[str, Callable[[View], Tensor]] = {"even": even_quota, "dream": dream_quota}


def check_quota(decoder: Any) -> None:
    """Refuse options that `by_quota` cannot take."""
    check_choice("quota", decoder.quota, QUOTAS)
    check_number(decoder, "position_temperature", 0.0, below=True)


def by_quota(view: View, scores: Tensor, quota: str, position_temperature: float = 0.0) -> Choice:
    """Choose the quota's number of masked positions, those with the largest scores.

    With a `position_temperature` they are drawn from ``softmax(scores / position_temperature)`` without replacement.
    """
    return Choice(scores, view.masked, "top_k", quota=QUOTAS[quota](view), temperature=position_temperature)
