"""Random problems for `select`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RULES = ("top_k", "threshold", "factor", "entropy_bound")
BOUNDS = {"top_k": 0.0, "threshold": 0.65, "factor": 1.0, "entropy_bound": 1.5}


def random_selection(
    rule: str, trial: int, sequences: int = 4, entries: int | None = None, device: str = "cpu"
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]:
    """(arguments but the state), (input_ids, masked, remaining). Odd trials have many equal scores."""
    generator = torch.Generator().manual_seed(trial)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    entries = entries or int(integers(90)) + 1
    length = entries + 10
    scores = torch.rand(sequences, entries, generator=generator)
    scores = scores.round(decimals=1) if trial % 2 else scores
    scores = scores * 3 if rule == "entropy_bound" else scores
    scores[-1, 0] = torch.nan
    candidates = torch.rand(sequences, entries, generator=generator) < (0.5, 1.0, 0.1, 0.0)[trial % 4]
    tokens = integers(99, sequences, entries)
    tokens[0, 0] = -1
    positions = torch.stack([torch.randperm(length, generator=generator)[:entries] for _ in range(sequences)])
    positions = positions.sort(-1).values
    quota = integers(entries + 2, sequences) if rule == "top_k" else None
    temperature = 0.5 if rule == "top_k" and trial % 3 == 0 else 0.0
    keys = integers(1000, sequences, entries, 3)
    inputs = (scores, candidates, tokens, positions, quota, torch.tensor(99), keys)
    on_device = [None if x is None else x.to(device) for x in inputs]
    state = (
        torch.full((sequences, length), -7, device=device),
        torch.ones(sequences, length, dtype=torch.bool, device=device),
        torch.full((sequences,), 50, device=device),
    )
    return (*on_device, rule, BOUNDS[rule], temperature), state
