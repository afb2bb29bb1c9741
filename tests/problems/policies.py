"""Small random networks for the learned decoder."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from mdkern.decoders import Policy
from mdkern.decoders.policy import FEATURES, FILTER
from tests.problems.decoder_states import VOCAB


def random_policy(kind: str = FILTER, hidden: int | None = 7, seed: int = 0, **changes: Any) -> Policy:
    """A policy whose scores have a spread of about 1; `hidden` None: a linear one."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(FEATURES), 1] if hidden is None else [len(FEATURES), hidden, 1]
    layers = tuple(
        (torch.randn(after, before, generator=generator) / before**0.5, torch.randn(after, generator=generator) / 4)
        for before, after in itertools.pairwise(sizes)
    )
    mean, deviation = torch.randn(10, generator=generator) / 4, torch.rand(10, generator=generator) + 0.5
    facts: dict[str, Any] = {"bound": 0.5, "block_length": None, "vocab_size": VOCAB}
    return Policy(layers, mean, deviation, kind=kind, **(facts | changes))
