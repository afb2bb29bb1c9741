"""`skinny_linear`, `skinny_swiglu`, `skinny_parts`: products of a few rows, which cost the reading of the weights.

Several weights are read in one launch where they are, so that no packed copy of them is needed. What follows a product
is done with it: the activation of a Llama's MLP (Shazeer, 2002.05202) in `skinny_swiglu`; and `skinny_parts` leaves the
last sum of a product that is divided among programs to the `rms_norm` that reads it. This file has the contracts and
the references in plain PyTorch; `triton_skinny` has the GPU kernel. Measurements: docs/notes/llama.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.swiglu import swiglu_reference
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.device import is_hopper
from mdkern.kernels.invariant import rows_to_choose_by
from mdkern.kernels.operator import operator

MOST_ROWS = 64  # with more, cuBLAS is as fast
COLUMN_TILE = 128  # numbers of columns must be multiples of it
SPLITS = 4  # parts of a product's inner dimension
INNER_TILE = 128


def skinny_linear_reference(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    third_bias: Tensor | None,
) -> Tensor:
    """`skinny_linear` in plain PyTorch."""
    layers = (first, first_bias), (second, second_bias), (third, third_bias)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in layers if weight is not None], 1)


def skinny_swiglu_reference(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None
) -> Tensor:
    """`skinny_swiglu` in plain PyTorch."""
    rows = x.to(wide(x))
    first, second = (
        F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        for weight, bias in ((gate, gate_bias), (up, up_bias))
    )
    return swiglu_reference(first, second).to(x.dtype)


def skinny_parts_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`skinny_parts` in plain PyTorch."""
    rows, weight = x.to(wide(x)), weight.to(wide(x))
    parts = torch.stack([F.linear(*pair) for pair in zip(rows.chunk(SPLITS, 1), weight.chunk(SPLITS, 1))])
    if bias is not None:
        parts[0] += bias
    return parts


def new_linear(x: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], sum(len(weight) for weight in (first, second, third) if weight is not None))


def new_swiglu(x: Tensor, gate: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], len(gate))


def new_parts(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(SPLITS, x.shape[0], len(weight), dtype=wide(x))


KERNELS = "mdkern.kernels.backbone.triton_skinny"
skinny_linear_operator = operator(skinny_linear_reference, new_linear, f"{KERNELS}:skinny_linear", name="skinny_linear")
skinny_swiglu_operator = operator(skinny_swiglu_reference, new_swiglu, f"{KERNELS}:skinny_swiglu", name="skinny_swiglu")
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


def skinny_linear(
    x: Tensor,  # [N, K]
    *layers: tuple[Tensor, Tensor | None],  # weight [C, K] and bias [C]
) -> tuple[Tensor, ...]:
    """``x @ weight.T + bias`` of each of one to three layers.

    Args:
        x: floating ``[N, K]``.
        layers: of the dtype of `x`.

    Returns:
        ``[N, C]`` of each layer, columns of one tensor.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if not 1 <= len(layers) <= 3:
        raise ValueError(f"one to three layers can be run at once, not {len(layers)}")
    for weight, bias in layers:
        check_layer(x, weight, bias)
    weights, biases = zip(*layers)
    missing = (None,) * (3 - len(layers))
    product: Tensor = skinny_linear_operator(x, *weights, *missing, *biases, *missing)
    return product.split([len(weight) for weight in weights], 1)


def skinny_swiglu(
    x: Tensor,  # [N, K]
    gate: tuple[Tensor, Tensor | None],  # weight [F, K] and bias [F]
    up: tuple[Tensor, Tensor | None],
) -> Tensor:
    """``silu(gate(x)) * up(x)`` of two layers. The products are not rounded before they are multiplied.

    Args:
        x: floating ``[N, K]``.
        gate, up: of the dtype of `x`.

    Returns:
        ``[N, F]`` of the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_layer(x, *gate)
    check_layer(x, *up)
    if gate[0].shape != up[0].shape:
        raise ValueError(f"gate and up must be of one shape, not {list(gate[0].shape)} and {list(up[0].shape)}")
    product: Tensor = skinny_swiglu_operator(x, gate[0], up[0], gate[1], up[1])
    return product


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
    if x.shape[1] % SPLITS:
        raise ValueError(f"rows of {x.shape[1]} numbers cannot be divided into {SPLITS} parts")
    parts: Tensor = skinny_parts_operator(x, weight, bias)
    return parts


def check_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x, x.shape, x.dtype, x.device)
    if x.ndim != 2 or not x.is_floating_point() or weight.ndim != 2:
        raise ValueError(f"x must be floating [N, K] and a weight [C, K], not {x.dtype} {list(x.shape)}")
    check_tensor("weight", weight, (weight.shape[0], x.shape[1]), x.dtype, x.device)
    check_tensor("bias", bias, weight.shape[:1], x.dtype, x.device)
