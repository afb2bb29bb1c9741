"""`combine`: weighted sums of some rows, by which a mixture of experts puts the experts' outputs together.

This file has the contract and the reference in plain PyTorch; `triton_combine` is the GPU kernel, one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator


def combine_reference(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """`combine` in plain PyTorch."""
    return (rows[place].float() * weights[..., None]).sum(1).to(rows.dtype)


def combine_outputs(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(place.shape[0], rows.shape[1])


combine_operator = operator(
    combine_reference, combine_outputs, "mdkern.kernels.backbone.triton_combine:combine", name="combine"
)


def combine(
    rows: Tensor,  # [S, D]
    place: Tensor,  # [T, K]
    weights: Tensor,  # [T, K]
) -> Tensor:
    """``sum_k weights[t, k] * rows[place[t, k]]`` for each t, summed in float32.

    Args:
        rows: floating ``[S, D]``, contiguous.
        place: int64 ``[T, K]`` in 0..S-1. On a GPU its values are not checked.
        weights: float32 ``[T, K]``.

    Returns:
        ``[T, D]`` of the dtype of `rows`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if rows.ndim != 2 or not rows.is_floating_point() or not rows.is_contiguous():
        raise ValueError(f"rows must be floating [S, D] and contiguous, not {rows.dtype} {list(rows.shape)}")
    if place.ndim != 2:
        raise ValueError(f"place must be [T, K], not {list(place.shape)}")
    check_tensor("place", place, place.shape, torch.int64, rows.device)
    check_tensor("weights", weights, place.shape, torch.float32, rows.device)
    combined: Tensor = combine_operator(rows, place.contiguous(), weights.contiguous())
    return combined
