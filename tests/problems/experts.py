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
    """The first arguments of `gated_experts`. The last expert has no row, if another is left for every choice."""
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


def listed(gate_up: Tensor, down: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The weights as tensors of their own, in memory in another order."""
    gates, ups = ([part.clone() for part in reversed(half)] for half in gate_up.chunk(2, dim=1))
    return gates[::-1], ups[::-1], [part.clone() for part in down]


def routing_problem(
    rows: int, experts: int, biased: bool, parts: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """The first arguments of `route_experts`."""
    generator = torch.Generator().manual_seed(rows)
    products = torch.randn(parts, rows, experts, generator=generator).to(dtype).to(device)
    return products, 0.3 * torch.randn(experts, generator=generator).to(device) if biased else None


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
