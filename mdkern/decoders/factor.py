"""As many positions as are jointly confident enough (Fast-dLLM, Wu et al., 2505.22618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_number, check_of


@dataclass(frozen=True)
class Factor(Stepwise, name="factor"):
    """Reveal the longest prefix by descending probability c whose n-th has ``(n + 1)(1 - c) < factor``, or the best."""

    adaptive: ClassVar[bool] = True

    factor: float = 1.0
    of: str = "model"  # or "sampler": probabilities after temperature and filters

    def __post_init__(self) -> None:
        check_of(self.of)
        check_number(self, "factor", 0.0)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        return Choice(proposal.probability, view.masked, "factor", bound=self.factor)
