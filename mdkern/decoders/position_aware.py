"""PC-Sampler (Huang et al., 2508.13021): rare tokens first, and from left to right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_number, check_of
from mdkern.decoders.quotas import by_quota, check_quota

FLOOR = 1e-9  # added to a frequency before its logarithm


def reference_frequencies(ids: Tensor, vocab_size: int) -> Tensor:
    """Share of each token in a reference text, float32 ``[vocab_size]``: what `PositionAware` wants.

    Args:
        ids: integer tensor of any shape, tokens of the text.
        vocab_size: number of ids.

    Raises:
        ValueError: no ids, or some outside of the vocabulary.
    """
    if ids.numel() == 0 or ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(f"ids must be whole numbers in 0..{vocab_size - 1}, at least one")
    counts = torch.bincount(ids.flatten().long(), minlength=vocab_size)
    return (counts.double() / ids.numel()).float()


@dataclass(frozen=True, eq=False)
class PositionAware(Stepwise, name="position_aware"):
    """A step's quota of masked positions with the largest ``exp(-lam i) min(-p(token) log(f(token) + 1e-9), alpha)``.

    i is counted from the block's start; f is the token's frequency in a reference text, so that what is common
    everywhere, such as punctuation, waits.

    Args:
        frequency: float32 ``[V]``, see `reference_frequencies`.
        lam: decay per position, at least 0. The paper takes 0 to 1 by task.
        alpha: cap of the score, nats.
        quota: ``"even"`` (as the paper) or ``"dream"``, see `mdkern.decoders.quotas`.
        of: ``"model"``, or ``"sampler"``: probabilities after temperature and filters.
    """

    frequency: Tensor
    lam: float = 0.25
    alpha: float = 10.0
    quota: str = "even"
    of: str = "model"

    def __post_init__(self) -> None:
        check_number("lam", self.lam, 0.0, below=True)
        check_number("alpha", self.alpha, 0.0, above=True)
        check_quota(self.quota, 0.0)
        check_of(self.of)
        frequency = torch.as_tensor(self.frequency)
        if frequency.ndim != 1 or not frequency.is_floating_point() or frequency.numel() == 0:
            raise ValueError(f"frequency must be floating [V], not {frequency.dtype} {tuple(frequency.shape)}")
        if not bool(((frequency >= 0) & (frequency <= 1)).all()):
            raise ValueError("frequency must hold shares, from 0 to 1")
        object.__setattr__(self, "frequency", frequency.float())

    def fitted(self, vocab_size: int, device: torch.device) -> Self:
        if self.frequency.shape[0] < vocab_size:
            raise ValueError(f"frequency must have {vocab_size} entries, one per id, not {self.frequency.shape[0]}")
        return replace(self, frequency=self.frequency.to(device))

    def choose(self, view: View, proposal: Proposal) -> Choice:
        frequency = self.frequency[proposal.token.clamp(min=0)]
        calibrated = (-proposal.probability * torch.log(frequency + FLOOR)).clamp(max=self.alpha)
        # The score's logarithm, which has the same order: at lam = 0.25 the score itself is 0 in float32 from i = 416.
        return by_quota(view, torch.log(calibrated) - self.lam * view.offset, self.quota)
