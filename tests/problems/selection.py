"""Random problems for `select`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

RULES = ("top_k", "threshold", "factor", "entropy_bound")
BOUNDS = {"top_k": 0.0, "threshold": 0.65, "factor": 1.0, "entropy_bound": 1.5}


ENDS = {  # of each rule's bound
    "top_k": (0.0,),
    "threshold": (0.7, -torch.inf, torch.inf),
    "factor": (0.0, 1e-4, 3.0, torch.inf),
    "entropy_bound": (-1.0, 0.0, 1e-7, 30.0, torch.inf),
}
AWKWARD = (
    lambda u: (u * 8).round() / 8,
    lambda u: torch.full_like(u, 0.7),
    lambda u: torch.where(u < 0.5, -0.0, 0.0),
    lambda u: torch.where(u < 0.3, -torch.inf, torch.where(u < 0.6, torch.inf, torch.where(u < 0.8, torch.nan, 0.5))),
    lambda u: 1.0 - u * 1e-4,
    lambda u: (u - 0.5) * 1e-6,  # entropies of 0 that rounding has made negative
    lambda u: u * 1e-30 - 1e-31,
    lambda u: torch.special.ndtri(u) * 10,
)


def awkward_selection(
    rule: str, number: int, bound: float, entries: int, device: str = "cpu"
) -> tuple[tuple[Any, ...], Tensor]:
    """As `random_selection`: scores that are `AWKWARD`, with a `bound`, of which some may not be chosen."""
    generator = torch.Generator().manual_seed(number)
    scores = AWKWARD[number](torch.rand(3, entries, generator=generator))
    if rule == "factor":
        scores = scores.clamp(max=1.0)
    candidates = torch.rand(3, entries, generator=generator) < torch.tensor([[0.9], [0.1], [0.0]])
    tokens = torch.randint(-1, 20, (3, entries), generator=generator)
    quota = torch.randint(0, entries + 2, (3,), generator=generator) if rule == "top_k" else None
    inputs = (scores, candidates, tokens, quota, None, None)
    on_device = (None if x is None else x.to(device) for x in inputs)
    return (*on_device, rule, bound, 0.0), torch.full((3, entries), -7, device=device)


def outcomes(
    implementations: Sequence[Callable[..., Tensor]], arguments: tuple[Any, ...], input_ids: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """What each implementation reveals, and the ids that it leaves: of each of the two, one from each."""
    results = []
    for implementation in implementations:
        written = input_ids.clone()
        results.append((implementation(*arguments[:3], written, *arguments[3:]), written))
    return zip(*results)


def random_selection(
    rule: str, trial: int, sequences: int = 4, entries: int | None = None, device: str = "cpu"
) -> tuple[tuple[Any, ...], Tensor]:
    """(the operator's arguments but the ids), input_ids. Odd trials have many equal scores."""
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
    quota = integers(entries + 2, sequences) if rule == "top_k" else None
    temperature = 0.5 if rule == "top_k" and trial % 3 == 0 else 0.0
    keys = integers(1000, sequences, entries, 3)
    inputs = (scores, candidates, tokens, quota, torch.tensor(99), keys)
    on_device = [None if x is None else x.to(device) for x in inputs]
    return (*on_device, rule, BOUNDS[rule], temperature), torch.full((sequences, length), -7, device=device)
