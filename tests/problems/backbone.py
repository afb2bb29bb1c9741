"""Random tensors for the tests of the inference operators."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def modulation(
    width: int, sequences: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight ``[D]``; shift, scale and gate ``[S, D]``, as parts of one matrix, or ``[D]`` if `sequences` is 0."""
    weight = 1 + 0.2 * normal(10, width)
    parts = 0.5 * normal(11, max(1, sequences), 3 * width)
    shift, scale, gate = (parts if sequences else parts[0]).to(dtype).to(device).chunk(3, dim=-1)
    return weight.to(dtype).to(device), shift, scale, gate
