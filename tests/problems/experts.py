"""Random mixtures of experts, and what lies around them, for tests of `gated_experts` and `sandwich_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def experts_problem(
    rows: int,
    choices: int,
    experts: int,
    depth: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """The arguments of `gated_experts`. The last expert has no row, if another is left for every choice."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype).to(device)

    used = experts - 1 if experts > choices else experts
    index = torch.rand(rows, used, generator=generator).argsort(-1)[:, :choices]
    weights = torch.rand(rows, choices, generator=generator)
    x, gate_up, down = (
        normal(rows, depth) * depth**0.5,
        normal(experts, 2 * width, depth),
        normal(experts, depth, width),
    )
    return x, index.to(device), weights.to(device), gate_up, down


def sandwich_problem(
    rows: int, width: int, after: int, whole: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Any, ...]:
    """The arguments of `sandwich_norm`, in order: with all that is optional, or nothing of it."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    stream, first, second = normal(3, rows, width)
    weights = normal(3, width)
    optional = (second, weights[1], weights[2], normal(1)) if whole else (None,) * 4
    return stream, first, weights[0], *optional, list(normal(after, width)), 1e-3
