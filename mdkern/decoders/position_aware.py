"""PC-Sampler (Huang et al., 2508.13021): confident and rare tokens first, with a preference from left to right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_choice, check_number, check_of
from mdkern.decoders.quotas import QUOTAS, by_quota

FLOOR = 1e-9  # added to a frequency before its logarithm


def reference_frequencies(ids: Tensor, vocab_size: int) -> Tensor:
    """The share of each token in a reference text, float32 ``[vocab_size]``, for `PositionAware`.

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
    """A quota of masked positions at each step, those of the largest ``exp(-lam i) min(-p log(f + 1e-9), alpha)``.

    i is the position counted from the start of the block, p the probability of the proposed token, and f its frequency
    in a reference text, so that tokens that are common everywhere, such as punctuation, come late.

    Args:
        frequency: float32 ``[V]``, see `reference_frequencies`.
        lam: decay per position, at least 0. The paper uses 0 to 1, depending on the task.
        alpha: upper limit of the score, nats.
        quota: ``"even"`` (as the paper) or ``"dream"``, see `mdkern.decoders.quotas`.
        of: ``"model"``, or ``"sampler"``: probabilities after temperature and filters.
    """

    frequency: Tensor
    lam: float = 0.25
    alpha: float = 10.0
    quota: str = "even"
    of: str = "model"

    def __post_init__(self) -> None:
        check_number(self, "lam", 0.0, below=True)
        check_number(self, "alpha", 0.0, above=True)
        check_choice("quota", self.quota, QUOTAS)
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
        # The logarithm has the same order. The score itself would be 0 in float32 from i = 416 on at lam = 0.25.
        return by_quota(view, torch.log(calibrated) - self.lam * view.offset, self.quota)
