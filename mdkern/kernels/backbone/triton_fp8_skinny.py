"""`mdkern.kernels.backbone.fp8_skinny` in Triton: each program has some columns of the weight and all rows of x.

As in `triton_skinny` the weights are the left operand, and the few rows of x are the columns of the product. Both are
e4m3 for the matrix instruction; rows that are not yet are rounded here, tile by tile, after they were loaded.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mdkern.kernels.backbone.fp8_skinny import (
    TILE,
    fits,
    fp8_skinny_parts_reference,
    fp8_skinny_swiglu_reference,
    new_parts,
    new_swiglu,
)
from mdkern.kernels.backbone.scaled_linear import new_product, scaled_linear_reference
from mdkern.kernels.backbone.skinny import SPLITS
from mdkern.kernels.backbone.triton_scaled import scale_and_inverse
from mdkern.kernels.device import launches_early


class Tiling(NamedTuple):
    """Of a program: columns, numbers of the inner dimension in a step, steps loaded ahead, warps."""

    columns: int
    inner: int
    stages: int
    warps: int


LINEAR = Tiling(64, 128, 6, 4)
GATED = Tiling(TILE, 128, 4, 8)
FEW_GATED = Tiling(TILE, 256, 3, 8)  # of at most 32 rows
PARTS = Tiling(64, TILE, 5, 4)  # of rows in e4m3
WIDE_PARTS = Tiling(128, TILE, 5, 8)


@triton.jit(do_not_specialize=["rows"])
def fp8_skinny_kernel(
    x,  # [N, K]: e4m3 with scales, or wide without
    x_scales,  # [N], or [N, K / BLOCK_INNER]
    weight,  # e4m3 [C, K], contiguous; GATED: gate above up
    weight_scales,  # [C]
    bias,  # [C]
    out,  # [N, C] or [SPLITS, N, C]; GATED: e4m3 [N, C / 2]
    out_scales,  # [N, C / 2 / BLOCK]
    rows,  # N
    x_stride,
    COLUMNS: tl.constexpr,  # of the output
    INNER: tl.constexpr,  # K
    GATED: tl.constexpr,  # silu(first half) * second half
    TILED: tl.constexpr,  # x has a scale for each tile
    SPLITS: tl.constexpr,  # parts of the inner dimension
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # of columns
    BLOCK_INNER: tl.constexpr,
    EARLY: tl.constexpr,  # launched before the kernel before it has ended
):
    place = tl.program_id(0) * BLOCK
    split = tl.program_id(1)
    SPAN: tl.constexpr = INNER // SPLITS
    TILES: tl.constexpr = INNER // BLOCK_INNER
    row, column, inner = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK), tl.arange(0, BLOCK_INNER)
    there = row < rows
    read = x + row[:, None].to(tl.int64) * x_stride + split * SPAN + inner[None, :]
    entry = weight + (place + column).to(tl.int64)[:, None] * INNER + split * SPAN + inner[None, :]
    # No kernel before this one that lets it begin early writes the weight's scales.
    column_scale = tl.load(weight_scales + place + column)[:, None]
    if GATED:
        beside_scale = tl.load(weight_scales + COLUMNS + place + column)[:, None]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if x_scales is not None:  # a tile's scale is loaded while the tile before it is multiplied
        scale_at = x_scales + row * (TILES if TILED else 1) + split * (SPAN // BLOCK_INNER if TILED else 0)
        next_scale = tl.load(scale_at, mask=there, other=0.0)
    product = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
    if GATED:
        beside = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
    for k in range(0, SPAN, BLOCK_INNER):
        some = tl.load(read + k, mask=there[:, None], other=0.0)
        if x_scales is None:
            wide = some.to(tl.float32)
            scale, inverse = scale_and_inverse(tl.max(tl.abs(wide), 1))
            some = (wide * inverse[:, None]).to(tl.float8e4nv)
        elif TILED:
            scale = next_scale
            scale_at += 1
            next_scale = tl.load(scale_at, mask=there & (k + BLOCK_INNER < SPAN), other=0.0)
        if GATED:
            product = tl.dot(tl.load(entry + k), tl.trans(some), product)
            beside = tl.dot(tl.load(entry + COLUMNS * INNER + k), tl.trans(some), beside)
        elif (x_scales is None) or TILED:
            product += tl.dot(tl.load(entry + k), tl.trans(some)) * scale[None, :]
        else:
            product = tl.dot(tl.load(entry + k), tl.trans(some), product)
    product *= column_scale
    if GATED:
        beside *= beside_scale
    if (x_scales is not None) and not TILED:
        product *= next_scale[None, :]
        if GATED:
            beside *= next_scale[None, :]
    if bias is not None:
        added = tl.load(bias + place + column).to(tl.float32)[:, None]
        product += added if SPLITS == 1 else tl.where(split == 0, added, 0.0)
        if GATED:
            beside += tl.load(bias + COLUMNS + place + column).to(tl.float32)[:, None]
    if GATED:
        product = product * tl.sigmoid(product) * beside
        scale, inverse = scale_and_inverse(tl.max(tl.abs(product), 0))
        tl.store(out_scales + row * (COLUMNS // BLOCK) + tl.program_id(0), scale, mask=there)
        product = product * inverse[None, :]
    write = out + (split * rows + row).to(tl.int64)[:, None] * COLUMNS + place + column[None, :]
    tl.store(write, tl.trans(product).to(out.dtype.element_ty), mask=there[:, None])


def launch(
    x: Tensor,
    x_scales: Tensor | None,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tiling: Tiling,
    *,
    splits: int = 1,
    out_scales: Tensor | None = None,
) -> None:
    """`out_scales` are given for a gated product."""
    rows, inner = x.shape
    columns, early = out.shape[-1], launches_early(x.device)
    if not out.numel():
        return
    fp8_skinny_kernel[(columns // tiling.columns, splits)](
        x,
        x_scales,
        weight,
        weight_scales,
        bias,
        out,
        out_scales,
        rows,
        x.stride(0),
        COLUMNS=columns,
        INNER=inner,
        GATED=out_scales is not None,
        TILED=x_scales is not None and x_scales.ndim == 2,
        SPLITS=splits,
        BLOCK_ROWS=max(32, triton.next_power_of_2(rows)),  # fewer rows are no faster, and one kind more to compile
        BLOCK=tiling.columns,
        BLOCK_INNER=tiling.inner,
        EARLY=early,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        launch_pdl=early,
    )


def fp8_skinny_linear(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`fp8_skinny_linear` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(values, weight):
        return scaled_linear_reference(values, scales, weight, weight_scales, bias, dtype)
    out = new_product(values, scales, weight, weight_scales, bias, dtype)
    launch(values, scales, weight, weight_scales, bias, out, LINEAR)
    return out


def fp8_skinny_swiglu(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`fp8_skinny_swiglu` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(values, weight):
        return fp8_skinny_swiglu_reference(values, scales, weight, weight_scales, bias)
    out, out_scales = new_swiglu(values, scales, weight)
    tiling = FEW_GATED if len(values) <= 32 else GATED
    launch(values, scales, weight, weight_scales, bias, out, tiling, out_scales=out_scales)
    return out, out_scales


def fp8_skinny_parts(
    x: Tensor, scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """`fp8_skinny_parts` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(x, weight):
        return fp8_skinny_parts_reference(x, scales, weight, weight_scales, bias)
    out = new_parts(x, scales, weight)
    launch(x, scales, weight, weight_scales, bias, out, WIDE_PARTS if scales is None else PARTS, splits=SPLITS)
    return out
