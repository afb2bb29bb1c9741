"""`quantise_rows`, `quantise_columns`, `quantised_norm`: numbers in 8 bits, for products at twice the rate of 16.

The format is e4m3 (Micikevicius et al., 2209.05433): numbers up to 448 with three bits after the leading one, so that
rounding changes a number by at most 1/16 of it down to 2^-6, and by at most 2^-10 below. One scale for each row brings
the row into that range. Weights ``[C, K]`` are quantised by their rows, too, which is a scale for each output channel:

    x @ weight.T  ~  x_scale[:, None] * weight_scale * (x_fp8 @ weight_fp8.T)

This file has the contracts and the references in plain PyTorch; `triton_quantise` has the GPU kernels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.norm_constants import EPS
from mdkern.kernels.checks import check_tensor, check_written
from mdkern.kernels.operator import operator

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of the format
SMALLEST_SCALE = 2.0**-100  # a row of zeros, or of numbers that are no larger than 448 times this, has this scale
HALF_STEP = 2.0**-4  # the most that rounding changes a number that is not below `LEAST_NORMAL`, relative to it
LEAST_NORMAL = 2.0**-6


def rounded(x: Tensor) -> Tensor:
    """`x` in e4m3. Numbers beyond its range become the largest, as by the GPU's instruction; NaN stays NaN."""
    return x.clamp(-LARGEST, LARGEST).to(FP8)


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` in plain PyTorch."""
    full = x.float()
    most = full.abs().amax(1).clamp(min=SMALLEST_SCALE * LARGEST)
    inverse = torch.full_like(most, LARGEST) / most  # a number over a tensor would be rounded twice
    return rounded(full * inverse[:, None]), most * (1 / LARGEST)


def quantised_norm_reference(x: Tensor) -> Tensor:
    """`quantised_norm` in plain PyTorch."""
    return rounded(F.layer_norm(x.to(wide(x)), x.shape[-1:], eps=EPS) * norm_level(x.shape[1]))


def quantise_columns_reference(x: Tensor, level: Tensor) -> Tensor:
    """`quantise_columns` in plain PyTorch."""
    return rounded(x.float() * level)


KERNELS = "mdkern.kernels.backbone.triton_quantise"
quantise_rows_operator = operator(
    quantise_rows_reference,
    lambda x: (torch.empty_like(x, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)),
    f"{KERNELS}:quantise_rows",
    name="quantise_rows",
)
quantised_norm_operator = operator(
    quantised_norm_reference,
    lambda x: torch.empty_like(x, dtype=FP8),
    f"{KERNELS}:quantised_norm",
    name="quantised_norm",
)


quantise_columns_operator = operator(
    quantise_columns_reference,
    lambda x, level: torch.empty_like(x, dtype=FP8),
    f"{KERNELS}:quantise_columns",
    name="quantise_columns",
)


def quantise_layer_reference(
    quantised: Tensor,
    scale: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    shift: Tensor | None,
    gate: Tensor | None,
) -> None:
    """`quantise_layer` in plain PyTorch."""
    full = weight.float()
    entries, steps = quantise_rows_reference(full * factor)
    quantised.copy_(entries)
    scale.copy_(steps if gate is None else steps * gate)
    total = full.new_zeros(len(full)) if shift is None else full @ shift.float()
    total = total if bias is None else total + bias
    added.copy_(total if gate is None else total * gate)


quantise_layer_operator = operator(
    quantise_layer_reference,
    lambda *_: None,
    f"{KERNELS}:quantise_layer",
    mutates=("quantised", "scale", "added"),
    name="quantise_layer",
)


def norm_level(width: int) -> float:
    """The power of two that `quantised_norm` multiplies rows of `width` columns by.

    No entry of a normalised row is larger than ``sqrt(width)``, so that none leaves the range of the format.
    """
    return 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(width)))


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, or a weight's output channels, in e4m3 with a scale for each: ``x ~ fp8 * scale[:, None]``.

    The largest entry of each row becomes 448. An infinite entry makes itself NaN and the scale infinite, and NaN makes
    its whole row NaN, so that both are seen in the product.

    Args:
        x: floating ``[N, K]`` of at most 32 bits, any row stride.

    Returns:
        float8_e4m3fn ``[N, K]``, contiguous, and the scales, float32 ``[N]``.

    Raises:
        ValueError: not a matrix of floats of at most 32 bits with at least one column.
    """
    check_rows(x)
    quantised, scale = quantise_rows_operator(x)
    return quantised, scale


def quantise_columns(x: Tensor, level: Tensor) -> Tensor:
    """``x * level`` in e4m3. What is beyond its range becomes the largest number.

    Args:
        x: floating ``[N, K]`` of at most 32 bits, any row stride.
        level: float32 ``[K]``, which brings each column into the range.

    Returns:
        float8_e4m3fn ``[N, K]``, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_rows(x)
    check_tensor("level", level, x.shape[1:], torch.float32, x.device)
    quantised: Tensor = quantise_columns_operator(x, level)
    return quantised


def quantise_layer(
    weight: Tensor,  # [C, K]
    bias: Tensor | None,  # [C]
    factor: Tensor,  # [K]
    shift: Tensor | None = None,  # [K]
    gate: Tensor | None = None,  # [C]
    *,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """A linear layer in e4m3, with what lies before and behind it: ``gate * (weight @ (factor * x + shift) + bias)``.

    Of any ``x [K]`` that is ``out[0] @ x * out[1] + out[2]``, up to the rounding of ``weight * factor`` by rows.

    Args:
        weight: floating ``[C, K]`` of at most 32 bits, any row stride.
        bias, shift, gate: floating; None: no such step.
        factor: float32.
        out: float8_e4m3fn ``[C, K]``, and float32 ``[C]`` twice, contiguous: written in place.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_rows(weight)
    quantised, scale, added = out
    check_tensor("out[0]", quantised, weight.shape, FP8, weight.device)
    for name, vector, size in (("bias", bias, 0), ("shift", shift, 1), ("gate", gate, 0)):
        if vector is not None:
            check_tensor(name, vector, weight.shape[size : size + 1], vector.dtype, weight.device)
    check_tensor("factor", factor, weight.shape[1:], torch.float32, weight.device)
    for name, vector in (("out[1]", scale), ("out[2]", added)):
        check_tensor(name, vector, weight.shape[:1], torch.float32, weight.device)
    for number, tensor in enumerate(out):
        check_written(f"out[{number}]", tensor)
    quantise_layer_operator(quantised, scale, added, weight, bias, factor, shift, gate)


def quantised_norm(x: Tensor) -> Tensor:
    """``layer_norm(x) * norm_level(D)`` in e4m3, without a weight or a bias: those belong into the next product.

    Args:
        x: floating ``[N, D]`` of at most 32 bits, any row stride.

    Returns:
        float8_e4m3fn ``[N, D]``, contiguous.

    Raises:
        ValueError: not a matrix of floats of at most 32 bits with at least one column.
    """
    check_rows(x)
    normed: Tensor = quantised_norm_operator(x)
    return normed


def check_rows(x: Tensor) -> None:
    check_tensor("x", x, x.shape, x.dtype, x.device)
    if x.ndim != 2 or not x.shape[1] or not x.is_floating_point() or x.element_size() not in (2, 4):
        raise ValueError(f"x must be bfloat16, float16 or float32 [N, K], not {x.dtype} {list(x.shape)}")
