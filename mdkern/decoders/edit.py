"""LLaDA 2.1 (Bie et al., 2602.08676): tokens that were revealed may be replaced by better ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_number, check_of, check_whole


@dataclass(frozen=True)
class Edit(Stepwise, name="edit"):
    """Reveal masks where p > `mask_threshold`, at least the best one; replace tokens where p > `edit_threshold`.

    Both happen in the same step. A block ends when its last mask is gone and a step changed nothing, or after
    `closing_steps` steps without masks. The prompt is never edited.

    Args:
        mask_threshold: the published quality mode has 0.7, the speed mode 0.5.
        edit_threshold: the published quality mode has 0.5, the speed mode 0.
        closing_steps: at least 0.
        of: ``"model"``, or ``"sampler"``: probabilities after temperature and filters.
    """

    adaptive: ClassVar[bool] = True

    mask_threshold: float = 0.7
    edit_threshold: float = 0.5
    closing_steps: int = 16
    of: str = "model"

    def __post_init__(self) -> None:
        check_of(self.of)
        check_number(self, "mask_threshold", 0.0, 1.0)
        check_number(self, "edit_threshold", 0.0, 1.0)
        check_whole(self, "closing_steps", 0)

    def rows(self, view: View) -> Tensor:
        return view.masked | view.revealed

    def choose(self, view: View, proposal: Proposal) -> Choice:
        above = np.nextafter(np.float32(self.mask_threshold), np.float32(np.inf))  # `select` has >=, the paper >
        return Choice(proposal.probability, view.masked, "threshold", bound=float(above))

    def edit(self, view: View, proposal: Proposal) -> Tensor:
        return view.revealed & (proposal.probability > self.edit_threshold) & (proposal.token != view.ids)
