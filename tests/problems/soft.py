"""Problems for `soft_embedding`, and what their answers must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdkern.kernels import soft_embedding
from mdkern.kernels.head.arguments import Head
from tests.problems.projection import in_float8


@dataclass
class SoftProblem:
    """Random rows, head and table, with temperatures of several values, 0 among them."""

    rows: int = 9
    columns: int = 333
    depth: int = 48
    width: int = 40
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tied: bool = False
    biased: bool = False
    from_logits: bool = False
    float8: bool = False
    options: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.rows * 17 + self.columns)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype).to(self.device)

        self.hidden = normal(self.rows, self.columns if self.from_logits else self.depth)
        self.weight = None if self.from_logits else normal(self.columns, self.depth, scale=2.0 / self.depth**0.5)
        self.table = self.weight if self.tied else normal(self.columns, self.width)
        self.weight_scale = None
        if self.float8:
            self.weight, self.weight_scale = in_float8(self.weight)
        self.bias = None
        if self.biased:
            self.bias = torch.randn(self.columns, generator=generator)
            self.bias[::7] = -torch.inf
            self.bias = self.bias.to(self.device)
        self.temperature = torch.tensor([1.0, 0.5, 2.0, 0.0]).repeat(self.rows)[: self.rows].to(self.device)
        self.logsumexp = (self.logits() / self.divisor().double()).logsumexp(-1).float()

    def divisor(self) -> Tensor:
        return self.temperature.masked_fill(self.temperature == 0, 1.0)[:, None]

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        product = self.hidden.to(dtype) if self.weight is None else self.hidden.to(dtype) @ self.weight.to(dtype).T
        product = product if self.weight_scale is None else product * self.weight_scale.to(dtype)
        product, cap = product * self.options.get("scale", 1.0), self.options.get("soft_cap", 0.0)
        product = cap * torch.tanh(product / cap) if cap else product
        return product if self.bias is None else product + self.bias.to(dtype)

    def exact(self) -> Tensor:
        assert self.table is not None
        return (self.logits() / self.divisor().double()).softmax(-1) @ self.table.double()

    def run(self) -> Tensor:
        table = None if self.tied else self.table
        options = {"weight_scale": self.weight_scale, **self.options}
        return soft_embedding(self.hidden, self.weight, self.bias, self.logsumexp, self.temperature, table, **options)

    def arguments(self) -> tuple[Any, ...]:
        """Of the implementations behind the operator."""
        scale, cap = self.options.get("scale", 1.0), self.options.get("soft_cap", 0.0)
        head = Head(self.weight, self.bias, scale, cap, self.weight_scale)
        return self.hidden, head, None if self.tied else self.table, self.logsumexp, self.temperature, 1.0

    def flat(self) -> tuple[Any, ...]:
        hidden, head, *rest = self.arguments()
        return (hidden, *head, *rest)
