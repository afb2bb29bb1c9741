"""The largest gaps between the two best tokens first (Kim et al., 2502.06768); Dream's ``topk_margin``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_of
from mdkern.decoders.quotas import by_quota, check_quota


@dataclass(frozen=True)
class Margin(Stepwise, name="margin"):
    """Reveal a quota of masked positions at each step, those with the largest gap between the two best probabilities.

    Args:
        position_temperature: if above 0, positions are drawn from ``softmax(margin / position_temperature)``.
        quota: ``"even"`` (LLaDA), ``"dream"`` or a `DreamQuota`, see `mdkern.decoders.quotas`.
        of: ``"model"``, or ``"sampler"``: probabilities after temperature and filters, as in Dream's code.
    """

    wants_top: ClassVar[bool] = True
    scores_draw: ClassVar[bool] = False

    position_temperature: float = 0.0
    quota: Any = "even"
    of: str = "model"

    def __post_init__(self) -> None:
        check_quota(self)
        check_of(self.of)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        assert proposal.top1 is not None
        assert proposal.top2 is not None
        return by_quota(view, proposal.top1 - proposal.top2, self.quota, self.position_temperature)
