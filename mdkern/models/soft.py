"""Soft inputs: the embedding of a token that the model is not sure of, mixed with that of the mask (DMax).

With the probability p of a token, and embeddings E, a model's input at its position is

    m = p E[token] + (1 - p) E[mask],    e = m (p |E[token]| + (1 - p) |E[mask]|) / (|m| + 1e-6),

in float32, rounded to the dtype of E. Where p is 1, it is E[token] in all bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_NORM = 1e-6


def mixture(tokens: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """The inputs e for ``tokens [..., D]``, embeddings of tokens, ``mask [D]``, that of the mask, and p ``[...]``."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    wide, wide_mask, p = tokens.to(dtype), mask.to(dtype), weight.to(dtype)[..., None]
    mixed = torch.lerp(wide_mask, wide, p)
    size = torch.lerp(length_of(wide_mask), length_of(wide), p)
    scaled = mixed * (size / (length_of(mixed) + SMALLEST_NORM))
    return torch.where(weight[..., None] < 1.0, scaled.to(tokens.dtype), tokens)


def length_of(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


class Soft(NamedTuple):
    """What is soft of a pass, see `soften`."""

    mask_id: int
    weight: Tensor  # float32 [B, R]
    positions: Tensor | None  # int64 [B, R]

    def rows(self, table: Tensor, input_ids: Tensor) -> Tensor:
        """The embeddings of ``input_ids [B, L]`` in ``table [V, D]``, with mixtures, as rows ``[B * L, D]``."""
        return soften(table[input_ids], table[self.mask_id], self.weight, self.positions).flatten(0, 1)


def soften(embedded: Tensor, mask: Tensor, weight: Tensor | None, positions: Tensor | None) -> Tensor:
    """The embeddings of a pass, ``embedded [B, L, D]``, with mixtures at ``positions [B, R]`` (None: everywhere).

    Args:
        mask: ``[D]``, the embedding of the mask.
        weight: float32 ``[B, R]``, the probability p of each of these tokens; None: the tokens as they are. A position
            that is named twice must have one weight.
    """
    if weight is None:
        return embedded
    if positions is None:
        return mixture(embedded, mask, weight)
    place = positions[..., None].expand(-1, -1, embedded.shape[-1])
    return embedded.scatter(1, place, mixture(embedded.gather(1, place), mask, weight))
