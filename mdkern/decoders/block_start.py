"""Decoders whose blocks begin with their first position alone, as in Fast-dLLM's code for Dream (2505.22618).

Dream's logits at one position are for the token of the next. A pass over a block alone lacks those of its first
position, so that Fast-dLLM takes that token from the full pass before, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mdkern.decoders.base import Choice, Proposal, View
from mdkern.decoders.entropy import Entropy
from mdkern.decoders.threshold import Threshold


@dataclass(frozen=True)
class StartedThreshold(Threshold):
    """`Threshold` after a first step that reveals the block's first position."""

    def choose(self, view: View, proposal: Proposal) -> Choice:
        return first_alone(view, super().choose(view, proposal))


@dataclass(frozen=True)
class StartedEntropy(Entropy):
    """`Entropy` after a first step that reveals the block's first position."""

    def choose(self, view: View, proposal: Proposal) -> Choice:
        return first_alone(view, super().choose(view, proposal))


def first_alone(view: View, choice: Choice) -> Choice:
    """The choice, at the first step of a block only of the block's first position."""
    start = view.block_step == 0
    candidates = choice.candidates & (~start[:, None] | (view.offset == 0))
    return replace(choice, candidates=candidates, quota=None if choice.quota is None else choice.quota.where(~start, 1))
