"""The most probable tokens first: LLaDA's low-confidence remasking (2502.09992), Dream's and MaskGIT's confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_of
from mdkern.decoders.quotas import by_quota, check_quota


@dataclass(frozen=True)
class TopProbability(Stepwise, name="top_probability"):
    """Reveal a quota of masked positions at each step, those whose proposed tokens have the largest probabilities.

    Args:
        position_temperature: if above 0, positions are drawn from ``softmax(probability / position_temperature)``.
        quota: ``"even"`` (LLaDA), ``"dream"`` or a `DreamQuota`, see `mdkern.decoders.quotas`.
        of: ``"model"``, or ``"sampler"``: probabilities after temperature and filters, as in Dream's code.
    """

    position_temperature: float = 0.0
    quota: Any = "even"
    of: str = "model"

    def __post_init__(self) -> None:
        check_quota(self)
        check_of(self.of)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        return by_quota(view, proposal.probability, self.quota, self.position_temperature)
