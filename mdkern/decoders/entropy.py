"""Positions of the smallest entropy first; Dream's ``entropy`` (Ye et al., 2508.15487)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_of
from mdkern.decoders.quotas import by_quota, check_quota


@dataclass(frozen=True)
class Entropy(Stepwise, name="entropy"):
    """Reveal a quota of masked positions at each step, those whose distributions have the smallest entropies.

    Args:
        position_temperature: if above 0, positions are drawn from ``softmax(-entropy / position_temperature)``.
        quota: ``"even"`` (LLaDA), ``"dream"`` or a `DreamQuota`, see `mdkern.decoders.quotas`.
        of: ``"model"``, or ``"sampler"``: entropies after temperature and filters, as in Dream's code.
    """

    wants_entropy: ClassVar[bool] = True
    scores_draw: ClassVar[bool] = False

    position_temperature: float = 0.0
    quota: Any = "even"
    of: str = "model"

    def __post_init__(self) -> None:
        check_quota(self)
        check_of(self.of)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        assert proposal.entropy is not None
        return by_quota(view, -proposal.entropy, self.quota, self.position_temperature)
