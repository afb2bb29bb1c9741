"""How many positions are revealed at a step, for the decoders that take the best positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, View, even_quota
from mdkern.decoders.checks import check_choice, check_number, check_whole


@dataclass(frozen=True)
class DreamQuota:
    """Dream's quota (Ye et al., 2508.15487), int64 ``[B]``: ``int(masked (1 - s / t))`` for each sequence.

    t goes linearly from 1 to `eps` over the block's steps; at its last step the quota is all that is left. It is worked
    out in float32 as in Dream's code, whose rounding decides where the product is a whole number.

    Args:
        eps: the last t, in (0, 1).
        least: the smallest quota while something is masked. Dream's own code has 0: it may reveal nothing in a step,
            and then more in the last one.
    """

    eps: float = 1e-3
    least: int = 1

    def __post_init__(self) -> None:
        check_number(self, "eps", 0.0, 1.0, above=True, below=True)
        check_whole(self, "least", 0)

    def __call__(self, view: View) -> Tensor:
        left, steps = view.masked.sum(-1), view.block_steps
        last = torch.full_like(left, self.eps, dtype=torch.float32)
        width = ((last - 1.0) / steps).double()

        def time(step: Tensor) -> Tensor:  # as `torch.linspace` counts: from both ends, with one rounding
            return torch.where(step < (steps + 1) // 2, 1.0 + width * step, last - width * (steps - step)).float()

        share = 1.0 - time(view.block_step + 1) / time(view.block_step)
        quota = (left.float() * share).long()
        return torch.where(view.block_step >= steps - 1, left, quota.clamp(min=self.least))


dream_quota = DreamQuota()
QUOTAS: dict[str, Callable[[View], Tensor]] = {"even": even_quota, "dream": dream_quota}


def check_quota(decoder: Any) -> None:
    """Refuse options that `by_quota` cannot take."""
    if not callable(decoder.quota):
        check_choice("quota", decoder.quota, QUOTAS)
    check_number(decoder, "position_temperature", 0.0, below=True)


def by_quota(view: View, scores: Tensor, quota: Any, position_temperature: float = 0.0) -> Choice:
    """Choose the quota's number of masked positions, those with the largest scores.

    `quota`: a name of `QUOTAS`, or a function from a view to int64 ``[B]``, such as a `DreamQuota`. With a
    `position_temperature` they are drawn from ``softmax(scores / position_temperature)`` without replacement.
    """
    count = QUOTAS[quota](view) if isinstance(quota, str) else quota(view)
    return Choice(scores, view.masked, "top_k", quota=count, temperature=position_temperature)
