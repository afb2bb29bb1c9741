"""Routers: which denoiser runs a sequence's next pass, chosen for each sequence from what the last pass showed.

A `mdkern.Schedule` fixes the model of every step beforehand. A router is given in its place,
``sample(heavy, light, EntropyRouter(lower=2.0, upper=5.0), decoder=...)``, with a decoder that looks at the model.
Sequences that wait for the same model fill its batches together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from mdkern.decoders.base import Proposal, View
from mdkern.decoders.checks import check_tensor, copied, copied_proposal

__all__ = ["EntropyRouter", "Router"]


@dataclass(frozen=True)
class Router:
    """Base of all routers, which are frozen dataclasses of their parameters."""

    models: ClassVar[tuple[str, ...]] = ("H", "L")  # names of the models; the first one runs the first pass
    wants_top: ClassVar[bool] = False  # whether `Proposal` has top1 and top2
    wants_entropy: ClassVar[bool] = False

    def route(self, view: View, proposal: Proposal, model: int) -> Tensor:
        """Number of the model, in `models`, that runs each sequence's next pass, int64 ``[B]``.

        It is called after every pass, in the same graph; what it says for a sequence must not depend on the others.

        Args:
            view: the sequences' blocks before the pass.
            proposal: what the model said, NaN where the decoder did not ask.
            model: number of the model that has just run.
        """
        raise NotImplementedError

    def asked(self, view: View, proposal: Proposal, model: int) -> Tensor:
        """What `route` says, checked as far as that needs no synchronisation. One of the user's is given copies."""
        if not type(self).__module__.startswith("mdkern."):
            view, proposal = copied(view), copied_proposal(proposal)
        route = self.route(view, proposal, model)
        check_tensor(self, "what route returns", route, view.step.shape, torch.int64)
        return route


@dataclass(frozen=True)
class EntropyRouter(Router):
    """The heavy model where the light one's choice matters: while the mean entropy lies between two bounds.

    The mean is over the masked positions of the last pass, in nats. Above `upper` little is known yet; below `lower`
    the text determines the rest. A sequence leaves a model only when the mean is `margin` beyond the bound, so that it
    does not go to and fro.
    """

    wants_entropy: ClassVar[bool] = True

    lower: float = 0.0
    upper: float = math.inf
    margin: float = 0.0

    def __post_init__(self) -> None:
        numbers = all(isinstance(value, Real) for value in (self.lower, self.upper, self.margin))
        if not (numbers and 0.0 <= self.lower <= self.upper and 0.0 <= self.margin < math.inf):
            raise ValueError(
                f"EntropyRouter: 0 <= lower <= upper and a finite margin of at least 0 are needed, not {self.lower!r},"
                f" {self.upper!r} and {self.margin!r}"
            )

    def route(self, view: View, proposal: Proposal, model: int) -> Tensor:
        assert proposal.entropy is not None
        entropy = torch.where(view.masked, proposal.entropy, 0.0).sum(-1) / view.masked.sum(-1).clamp(min=1)
        wider = self.margin if self.models[model] == "H" else -self.margin
        heavy = (entropy >= self.lower - wider) & (entropy <= self.upper + wider)
        return torch.where(heavy, 0, 1)
