"""A learned choice of positions: a small network looks at the model's statistics of a block."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_flag
from mdkern.decoders.policy import FILTER, Policy, check_bound, features


@dataclass(frozen=True, eq=False)
class Learned(Stepwise, name="learned"):
    """Reveal the masked positions of a block that a trained network takes for right, at least the best.

    The network sees ten numbers of every masked position (`mdkern.decoders.policy`). If it is a *filter*, as in
    Learn2PD (2509.25188), all positions are revealed whose proposed token it takes for right with a chance of at least
    `bound`. If it is an *order* (as in LO-ARM, 2503.05979), those with the largest scores are revealed, as long as the
    sum of their ``1 - p`` stays below `bound`.

    Args:
        policy: the folder that ``python -m training.policy`` wrote, or a `Policy`.
        bound: of the chance, between 0 and 1, or of the sum, above 0. Default: what the policy was saved with.
        fresh_noise: False: a position's token is drawn with the same noise at every step, as it is for training.
    """

    wants_top: ClassVar[bool] = True
    wants_entropy: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    policy: Policy | str | os.PathLike[str]
    bound: float | None = None
    fresh_noise: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.policy, str | os.PathLike):
            object.__setattr__(self, "policy", Policy.load(self.policy))
        if not isinstance(self.policy, Policy):
            raise ValueError(f"policy must be a Policy or the folder of one, not {type(self.policy).__name__}")
        if self.bound is None:
            object.__setattr__(self, "bound", self.policy.bound)
        check_bound(self.policy.kind, self.bound)
        check_flag(self, "fresh_noise")

    @property
    def batch_invariant(self) -> bool:
        return False  # the network reads sums over the columns

    @property
    def network(self) -> Policy:
        assert isinstance(self.policy, Policy)
        return self.policy

    @property
    def only_block_length(self) -> int | None:  # type: ignore[override]
        return self.network.block_length

    def fitted(self, vocab_size: int, device: torch.device) -> Self:
        if self.network.vocab_size != vocab_size:
            raise ValueError(
                f"policy was trained for a model with {self.network.vocab_size} ids, this one has {vocab_size}: train"
                " one for it"
            )
        return replace(self, policy=self.network.on(device))

    def choose(self, view: View, proposal: Proposal) -> Choice:
        policy, bound = self.network, self.bound
        assert bound is not None
        length = view.block_masked[:, None] if policy.block_length is None else policy.block_length
        scores = policy.score(features(view.masked, view.offset, proposal, policy.vocab_size - 1, length))
        if policy.kind == FILTER:  # logits are compared, as chances near 1 are equal in float32
            return Choice(scores, view.masked, "threshold", bound=math.log(bound / (1.0 - bound)))
        return Choice(scores, view.masked, "top_k", quota=within(scores, view.masked, proposal.probability, bound))


def within(scores: Tensor, masked: Tensor, probability: Tensor, budget: float) -> Tensor:
    """int64 ``[B]``: how many of the best-scored masked positions have ``sum(1 - p) < budget``, at least one."""
    order = torch.where(masked, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    cost = torch.where(masked, 1.0 - probability, torch.inf).gather(-1, order)
    return (cost.cumsum(-1) < budget).sum(-1).clamp(min=1)
