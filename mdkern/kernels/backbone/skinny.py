"""`skinny_parts`: a product of a few rows, which costs the reading of the weights.

It leaves the last sum of a product that is divided among programs to the `rms_norm` that reads it. Products of a few
rows with several weights: `mdkern.kernels.backbone.joint`. This file has the contract and the reference in plain
PyTorch; `triton_skinny` has the GPU kernel. Measurements: docs/notes/llama.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.device import is_hopper
from mdkern.kernels.invariant import rows_to_choose_by
from mdkern.kernels.operator import operator

MOST_ROWS = 64  # with more, cuBLAS is as fast
COLUMN_TILE = 128  # numbers of columns must be multiples of it
SPLITS = 4  # parts of a product's inner dimension
INNER_TILE = 128


def skinny_parts_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`skinny_parts` in plain PyTorch."""
    rows, weight = x.to(wide(x)), weight.to(wide(x))
    parts = torch.stack([F.linear(*pair) for pair in zip(rows.chunk(SPLITS, 1), weight.chunk(SPLITS, 1))])
    if bias is not None:
        parts[0] += bias
    return parts


def new_parts(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(SPLITS, x.shape[0], len(weight), dtype=wide(x))


KERNELS = "mdkern.kernels.backbone.triton_skinny"
skinny_parts_operator = operator(skinny_parts_reference, new_parts, f"{KERNELS}:skinny_parts", name="skinny_parts")


def runs_skinny(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernel is the fast way for these products: few rows, on the card that it was measured on."""
    few = rows_to_choose_by(x.shape[0]) <= MOST_ROWS
    return is_hopper(x.device) and few and all(fits(x, weight) for weight in weights)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can run a product."""
    columns, inner = weight.shape
    whole = columns % COLUMN_TILE == 0 and inner % (SPLITS * INNER_TILE) == 0
    narrow = x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] <= MOST_ROWS
    together = weight.is_contiguous() and x.stride(1) == 1
    return whole and narrow and together


def skinny_parts(
    x: Tensor,  # [N, K]
    weight: Tensor,  # [C, K]
    bias: Tensor | None = None,  # [C]
) -> Tensor:
    """``x @ weight.T + bias`` as `SPLITS` parts whose sum it is, for the `update` of `rms_norm`.

    Args:
        x: floating ``[N, K]``, with K a multiple of `SPLITS`.
        weight, bias: of the dtype of `x`.

    Returns:
        float32 (float64 for float64) ``[SPLITS, N, C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_layer(x, weight, bias)
    check_divided(x)
    parts: Tensor = skinny_parts_operator(x, weight, bias)
    return parts


def check_divided(x: Tensor) -> None:
    if x.shape[1] % SPLITS:
        raise ValueError(f"rows of {x.shape[1]} numbers cannot be divided into {SPLITS} parts")


def check_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x, x.shape, x.dtype, x.device)
    if x.ndim != 2 or not x.is_floating_point() or weight.ndim != 2:
        raise ValueError(f"x must be floating [N, K] and a weight [C, K], not {x.dtype} {list(x.shape)}")
    check_tensor("weight", weight, (weight.shape[0], x.shape[1]), x.dtype, x.device)
    check_tensor("bias", bias, weight.shape[:1], x.dtype, x.device)
