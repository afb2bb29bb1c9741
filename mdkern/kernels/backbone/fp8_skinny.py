"""`fp8_skinny_linear`, `fp8_skinny_swiglu`, `fp8_skinny_parts`: products of few rows with weights in e4m3.

They are those of `mdkern.kernels.backbone.skinny`, and cost half of the reading. Rows that come from a norm have a
scale each. Those that come from the activation have one for each `TILE` of their columns, as the programs that compute
them know no more of a row; and attention's are so rounded by the product that reads them. This file has the contracts
and the references in plain PyTorch; `triton_fp8_skinny` has the GPU kernel. Measurements: docs/notes/llama.md.
"""

from __future__ import annotations

from typing import NamedTuple

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
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.device import is_hopper
from mdkern.kernels.invariant import rows_to_choose_by
from mdkern.kernels.operator import operator

TILE = 128  # numbers of a row that share a scale
INNER_TILE = 256  # which must divide the inner dimension


class Tiled(NamedTuple):
    """Rows in e4m3 that have a scale for each `TILE` of their columns."""

    values: Tensor  # e4m3 [N, K]
    scales: Tensor  # float32 [N, K / TILE]

    def wide(self) -> Tensor:
        return (self.values.float().unflatten(1, (-1, TILE)) * self.scales[..., None]).flatten(1)


def tiled(x: Tensor) -> Tiled:
    """Rows ``[N, K]`` rounded tile by tile, as by `quantise_rows`."""
    values, scales = quantise_rows_reference(x.reshape(-1, TILE))
    return Tiled(values.view(x.shape), scales.view(len(x), -1))


def fp8_skinny_swiglu_reference(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`fp8_skinny_swiglu` in plain PyTorch."""
    both = scaled_linear_reference(values, scales, weight, weight_scales, bias, torch.float32)
    gate, up = both.chunk(2, 1)
    activated = tiled(swiglu_reference(gate, up))
    return activated.values, activated.scales


def fp8_skinny_parts_reference(
    x: Tensor, scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """`fp8_skinny_parts` in plain PyTorch."""
    rows = tiled(x) if scales is None else Tiled(x, scales)
    pairs = zip(rows.wide().chunk(SPLITS, 1), Scaled(weight, weight_scales).wide().chunk(SPLITS, 1))
    parts = torch.stack([F.linear(*pair) for pair in pairs])
    if bias is not None:
        parts[0] += bias
    return parts.to(wide(x))


def new_swiglu(values: Tensor, _: Tensor, weight: Tensor, *__: object) -> tuple[Tensor, Tensor]:
    rows, columns = len(values), len(weight) // 2
    scales = values.new_empty(rows, columns // TILE, dtype=torch.float32)
    return torch.empty((rows, columns), dtype=FP8, device=values.device), scales


def new_parts(x: Tensor, _: Tensor | None, weight: Tensor, *__: object) -> Tensor:
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


def fp8_skinny_swiglu(x: Scaled, weight: Scaled, bias: Tensor | None = None) -> Tiled:
    """``silu(gate(x)) * up(x)``, rounded once: the products are not rounded before they are multiplied.

    Args:
        x: ``[N, K]``.
        weight: ``[2 F, K]``, that of the gate above the other one; F a multiple of `TILE`.
        bias: floating ``[2 F]``.

    Returns:
        ``[N, F]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_operands(x, weight, bias)
    if len(weight.values) % (2 * TILE):
        raise ValueError(f"{len(weight.values)} columns cannot be divided into two halves of tiles of {TILE}")
    return Tiled(*fp8_skinny_swiglu_operator(*x, *weight, bias))


def fp8_skinny_parts(x: Tensor | Tiled, weight: Scaled, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as `SPLITS` parts whose sum it is, for the `update` of `rms_norm`.

    Args:
        x: ``[N, K]``, K a multiple of ``SPLITS * TILE``; what is floating is first rounded to `Tiled`.
        weight: ``[C, K]``.
        bias: floating ``[C]``.

    Returns:
        float32 (float64 for float64) ``[SPLITS, N, C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    values, scales = x if isinstance(x, Tiled) else (x, None)
    check_weight(values, weight, bias)
    width = values.shape[1]
    if width % (SPLITS * TILE):
        raise ValueError(f"rows of {width} numbers cannot be divided into {SPLITS} parts of tiles of {TILE}")
    check_tensor("the scales of x", scales, (len(values), width // TILE), torch.float32, values.device)
    parts: Tensor = fp8_skinny_parts_operator(values, scales, *weight, bias)
    return parts
