"""`scaled_linear`: products of rows in e4m3 that have a scale each, see `mdkern.kernels.backbone.quantise`.

This file has the contract and the reference in plain PyTorch; `launch_scaled_linear` has what a GPU runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.quantise import FP8
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator

MULTIPLE = 16  # of which a weight's sides must be multiples


class Scaled(NamedTuple):
    """Rows ``values * scales[:, None]``: of activations, or of a weight, which then has a scale for each channel."""

    values: Tensor  # e4m3 [N, K]
    scales: Tensor  # float32 [N]

    def wide(self) -> Tensor:
        return self.values.float() * self.scales[:, None]


def new_scaled(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Memory for `Scaled` of the shape of x."""
    return torch.empty(x.shape, dtype=FP8, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)


def scaled_linear_reference(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`scaled_linear` in plain PyTorch."""
    rows, columns = Scaled(values, scales).wide(), Scaled(weight, weight_scales).wide()
    return F.linear(rows, columns, None if bias is None else bias.float()).to(dtype)


def new_product(
    values: Tensor, _: Tensor, weight: Tensor, __: Tensor, ___: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty(len(values), len(weight), dtype=dtype)


scaled_linear_operator = operator(
    scaled_linear_reference,
    new_product,
    "mdkern.kernels.backbone.launch_scaled_linear:scaled_linear",
    name="scaled_linear",
)


def scaled_linear(x: Scaled, weight: Scaled, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias``, summed with the precision that the GPU has for e4m3, then scaled.

    Args:
        x: ``[N, K]``.
        weight: ``[C, K]``, contiguous; C and K are multiples of 16.
        bias: floating ``[C]``.
        dtype: of the result. On a GPU it is first rounded to bfloat16.

    Returns:
        ``[N, C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_operands(x, weight, bias)
    product: Tensor = scaled_linear_operator(*x, *weight, bias, dtype)
    return product


def check_operands(x: Scaled, weight: Scaled, bias: Tensor | None) -> None:
    """Refuse operands of `scaled_linear` that do not fit together."""
    check_tensor("x", x.values, x.values.shape, FP8, x.values.device)
    check_tensor("the scales of x", x.scales, x.values.shape[:1], torch.float32, x.values.device)
    check_weight(x.values, weight, bias)


def check_weight(x: Tensor, weight: Scaled, bias: Tensor | None) -> None:
    """Refuse a weight that does not fit to rows."""
    if x.ndim != 2 or weight.values.ndim != 2:
        raise ValueError(f"x must be [N, K] and a weight [C, K], not {list(x.shape)} and {list(weight.values.shape)}")
    columns = len(weight.values)
    check_tensor("weight", weight.values, (columns, x.shape[1]), FP8, x.device)
    check_tensor("the scales of the weight", weight.scales, (columns,), torch.float32, x.device)
    check_tensor("bias", bias, (columns,), torch.float32 if bias is None else bias.dtype, x.device)
    if columns % MULTIPLE or x.shape[1] % MULTIPLE or not weight.values.is_contiguous():
        shape = list(weight.values.shape)
        raise ValueError(f"a weight must be contiguous, and {MULTIPLE} must divide its sides, not {shape}")
