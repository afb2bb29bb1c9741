"""All positions that are confident enough (Fast-dLLM, Wu et al., 2505.22618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_number, check_of


@dataclass(frozen=True)
class Threshold(Stepwise, name="threshold"):
    """Reveal all masked positions whose proposed token has at least probability `threshold`, and always the best."""

    adaptive: ClassVar[bool] = True

    threshold: float = 0.9
    of: str = "model"  # or "sampler": probabilities after temperature and filters

    def __post_init__(self) -> None:
        check_of(self.of)
        check_number(self, "threshold", 0.0, 1.0)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        return Choice(proposal.probability, view.masked, "threshold", bound=self.threshold)
