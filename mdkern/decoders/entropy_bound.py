"""As many as an entropy budget allows (EB-Sampler, Ben-Hamu et al., 2505.24857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_number, check_of


@dataclass(frozen=True)
class EntropyBound(Stepwise, name="entropy_bound"):
    """Reveal the longest prefix of positions by ascending entropy H with ``sum H - max H <= gamma`` nats.

    At least one position is revealed. gamma = 0 reveals one, or all those of entropy 0; infinity reveals all.
    """

    adaptive: ClassVar[bool] = True
    wants_entropy: ClassVar[bool] = True
    scores_draw: ClassVar[bool] = False

    gamma: float = 0.1
    of: str = "model"  # or "sampler": entropies after temperature and filters

    def __post_init__(self) -> None:
        check_of(self.of)
        check_number(self, "gamma", 0.0)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        assert proposal.entropy is not None
        return Choice(proposal.entropy, view.masked, "entropy_bound", bound=self.gamma)
