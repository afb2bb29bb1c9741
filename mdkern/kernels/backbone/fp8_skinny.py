"""`fp8_skinny_linear`, `fp8_skinny_swiglu`, `fp8_skinny_parts`: products of few rows with weights in e4m3.

They are those of `mdkern.kernels.backbone.skinny`, and cost half of the reading. Rows that come from a norm are e4m3
already. Those that come from attention or from the activation are rounded by the product that reads them, with a scale
for each `TILE` of their columns, so that no kernel lies between the two. This file has the contracts and the references
in plain PyTorch; `triton_fp8_skinny` has the GPU kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.quantise import FP8, quantise_rows_reference
from mdkern.kernels.backbone.scaled_linear import (
    Scaled,
    check_operands,
    check_weight,
    new_product,
    scaled_linear_reference,
)
from mdkern.kernels.backbone.skinny import COLUMN_TILE, MOST_ROWS, SPLITS
from mdkern.kernels.backbone.swiglu import swiglu_reference
from mdkern.kernels.device import is_hopper
from mdkern.kernels.invariant import rows_to_choose_by
from mdkern.kernels.operator import operator

TILE = 128  # numbers of a wide row that share a scale
INNER_TILE = 256  # of the products that are not divided


def fp8_skinny_swiglu_reference(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`fp8_skinny_swiglu` in plain PyTorch."""
    both = scaled_linear_reference(values, scales, weight, weight_scales, bias, torch.float32)
    return swiglu_reference(*both.chunk(2, 1)).to(dtype)


def fp8_skinny_parts_reference(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """`fp8_skinny_parts` in plain PyTorch."""
    tiles = Scaled(*quantise_rows_reference(x.reshape(-1, TILE)))
    pairs = zip(tiles.wide().view(x.shape).chunk(SPLITS, 1), Scaled(weight, weight_scales).wide().chunk(SPLITS, 1))
    parts = torch.stack([F.linear(*pair) for pair in pairs])
    if bias is not None:
        parts[0] += bias
    return parts.to(wide(x))


def new_swiglu(values: Tensor, _: Tensor, weight: Tensor, __: Tensor, ___: Tensor | None, dtype: torch.dtype) -> Tensor:
    return values.new_empty(len(values), len(weight) // 2, dtype=dtype)


def new_parts(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(SPLITS, x.shape[0], len(weight), dtype=wide(x))


KERNELS = "mdkern.kernels.backbone.triton_fp8_skinny"
fp8_skinny_linear_operator = operator(
    scaled_linear_reference, new_product, f"{KERNELS}:fp8_skinny_linear", name="fp8_skinny_linear"
)
fp8_skinny_swiglu_operator = operator(
    fp8_skinny_swiglu_reference, new_swiglu, f"{KERNELS}:fp8_skinny_swiglu", name="fp8_skinny_swiglu"
)
fp8_skinny_parts_operator = operator(
    fp8_skinny_parts_reference, new_parts, f"{KERNELS}:fp8_skinny_parts", name="fp8_skinny_parts"
)


def runs_fp8_skinny(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernel is the fast way for these products: few rows, on the card that it was measured on."""
    few = rows_to_choose_by(x.shape[0]) <= MOST_ROWS
    return is_hopper(x.device) and few and all(fits(x, weight) for weight in weights)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can run a product."""
    columns, inner = weight.shape
    whole = columns % (2 * COLUMN_TILE) == 0 and inner % (SPLITS * TILE) == 0 and inner % INNER_TILE == 0
    narrow = x.dtype in (FP8, torch.bfloat16) and x.shape[0] <= MOST_ROWS
    return whole and narrow and weight.is_contiguous() and x.stride(1) == 1


def fp8_skinny_linear(x: Scaled, weight: Scaled, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """`scaled_linear` of few rows, rounded once."""
    check_operands(x, weight, bias)
    product: Tensor = fp8_skinny_linear_operator(*x, *weight, bias, dtype)
    return product


def fp8_skinny_swiglu(x: Scaled, weight: Scaled, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """``silu(gate(x)) * up(x)``. The products are not rounded before they are multiplied.

    Args:
        x: ``[N, K]``.
        weight: ``[2 F, K]``, that of the gate above the other one.
        bias: floating ``[2 F]``.
        dtype: of the result.

    Returns:
        ``[N, F]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_operands(x, weight, bias)
    product: Tensor = fp8_skinny_swiglu_operator(*x, *weight, bias, dtype)
    return product


def fp8_skinny_parts(x: Tensor, weight: Scaled, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as `SPLITS` parts whose sum it is, for the `update` of `rms_norm`.

    Args:
        x: floating ``[N, K]``, K a multiple of ``SPLITS * TILE``; it is rounded to e4m3 with a scale for each `TILE`
            columns of a row.
        weight: ``[C, K]``.
        bias: floating ``[C]``.

    Returns:
        float32 (float64 for float64) ``[SPLITS, N, C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_weight(x, weight, bias)
    if x.shape[1] % (SPLITS * TILE):
        raise ValueError(f"rows of {x.shape[1]} numbers cannot be divided into {SPLITS} parts of tiles of {TILE}")
    parts: Tensor = fp8_skinny_parts_operator(x, *weight, bias)
    return parts
