"""As many positions as are jointly confident enough (Fast-dLLM, Wu et al., 2505.22618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_choice, check_number, check_of


@dataclass(frozen=True)
class Factor(Stepwise, name="factor"):
    """Reveal the longest prefix by descending probability c whose n-th has ``(n + 1)(1 - c) < factor``, or the best.

    Args:
        factor: at least 0.
        of: ``"model"``, or ``"sampler"``: probabilities after temperature and filters.
        rule: ``"paper"``, or ``"code"``: as Fast-dLLM's code, which also reveals the last mask of a block together with
            the others if it alone fails the test, and counts equality as passing it.
    """

    adaptive: ClassVar[bool] = True

    factor: float = 1.0
    of: str = "model"
    rule: str = "paper"

    def __post_init__(self) -> None:
        check_of(self.of)
        check_choice("rule", self.rule, ("paper", "code"))
        check_number(self, "factor", 0.0)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        if self.rule == "paper":
            return Choice(proposal.probability, view.masked, "factor", bound=self.factor)
        best_first = proposal.probability.where(view.masked, -torch.inf).sort(-1, descending=True).values
        number = torch.arange(1, best_first.shape[1] + 1, device=best_first.device)
        passes = (best_first >= 1.0 - self.factor / (number + 1)) | (number == 1)
        prefix, left = passes.int().cumprod(-1).sum(-1), view.masked.sum(-1)
        return Choice(proposal.probability, view.masked, "top_k", quota=torch.where(prefix == left - 1, left, prefix))
