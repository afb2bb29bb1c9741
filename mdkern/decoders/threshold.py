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


@dataclass(frozen=True)
class PacedThreshold(Stepwise):
    """`Threshold` that reveals no more than an even share of the block's masks for each step so far.

    After step i (from 0) at most ``(i + 1) masks / steps`` positions are revealed. This is ``confidence_threshold`` of
    Fast-dLLM's code for Dream.
    """

    adaptive: ClassVar[bool] = True

    threshold: float = 0.9
    of: str = "model"

    def __post_init__(self) -> None:
        check_of(self.of)
        check_number(self, "threshold", 0.0, 1.0)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        left = view.masked.sum(-1)
        share = (view.block_masked // view.block_steps).clamp(min=1)
        allowed = share * (view.block_step + 1) - (view.block_masked - left)
        sure = (view.masked & (proposal.probability >= self.threshold)).sum(-1)
        return Choice(proposal.probability, view.masked, "top_k", quota=sure.minimum(allowed).clamp(min=1))
