"""How many positions a step reveals, for the decoders that take the best of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, View, even_quota
from mdkern.decoders.checks import check_choice, check_number


def dream_quota(view: View) -> Tensor:
    """Dream's quota (Ye et al., 2508.15487), int64 ``[B]``: ``int(masked (1 - s / t))`` of each sequence on its own.

    t runs linearly from 1 to 0.001 over the block's steps, so that ``1 - s / t = 999 / (1000 steps - 999 step)``,
    exact in integers. All that is left at the block's last step; and never 0 while something is masked, where Dream's
    own code reveals nothing in a step and more in the last one.
    """
    left = view.masked.sum(-1)
    quota = left * 999 // (1000 * view.block_steps - 999 * view.block_step).clamp(min=1)
    return torch.where(view.block_step >= view.block_steps - 1, left, quota.clamp(min=1))


QUOTAS: dict[str, Callable[[View], Tensor]] = {"even": even_quota, "dream": dream_quota}


def check_quota(quota: str, position_temperature: float) -> None:
    """Refuse options that `by_quota` cannot take."""
    check_choice("quota", quota, QUOTAS)
    check_number("position_temperature", position_temperature, 0.0, below=True)


def by_quota(view: View, scores: Tensor, quota: str, position_temperature: float = 0.0) -> Choice:
    """The quota's number of masked positions with the largest scores.

    With a `position_temperature` they are drawn from ``softmax(scores / position_temperature)`` without replacement.
    """
    return Choice(scores, view.masked, "top_k", quota=QUOTAS[quota](view), temperature=position_temperature)
