"""`mdkern.kernels.backbone.quantise` in Triton, for compute capability 8.9 or later, which can convert to e4m3."""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import fits
from mdkern.kernels.backbone.norm_constants import EPS
from mdkern.kernels.backbone.quantise import (
    FP8,
    LARGEST,
    SMALLEST_SCALE,
    norm_level,
    quantise_columns_reference,
    quantise_layer_reference,
    quantise_rows_reference,
    quantised_norm_reference,
)
from mdkern.kernels.backbone.triton_modulated_norm import unit_stride
from mdkern.kernels.device import computes_in_fp8
from mdkern.kernels.invariant import rows_to_choose_by

MOST = tl.constexpr(LARGEST)
LEAST = tl.constexpr(SMALLEST_SCALE * LARGEST)
PART = 4096  # columns that a program of `quantise_rows` reads at a time


@triton.jit
def round_to_fp8(x):
    """Like `quantise.rounded`, NaN included."""
    return tl.clamp(x, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def quantise_rows_kernel(
    x,
    quantised,
    scale,
    stride,
    WIDTH: tl.constexpr,  # K
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        held = tl.load(x + row * stride + start + column, mask=start + column < WIDTH, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(held), propagate_nan=tl.PropagateNan.ALL)
    undefined = tl.max((largest != largest).to(tl.int32), 0) > 0
    most = tl.maximum(tl.max(largest, 0), LEAST)
    most = tl.where(undefined, float("nan"), most)
    tl.store(scale + row, most * (1.0 / MOST))
    inverse = tl.div_rn(MOST, most)
    for start in range(0, WIDTH, BLOCK):
        inside = start + column < WIDTH
        held = tl.load(x + row * stride + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(quantised + row * WIDTH + start + column, round_to_fp8(held * inverse), mask=inside)


@triton.jit
def quantise_layer_kernel(
    weight,
    bias,
    factor,
    shift,
    gate,
    quantised,
    scale,
    added,
    stride,  # of a row of the weight
    WIDTH: tl.constexpr,  # K
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    held = tl.load(weight + row * stride + column, mask=within, other=0.0).to(tl.float32)
    total = 0.0
    if shift is not None:
        total += tl.sum(held * tl.load(shift + column, mask=within, other=0.0).to(tl.float32), 0)
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)
    held = held * tl.load(factor + column, mask=within, other=0.0)
    undefined = tl.max((held != held).to(tl.int32), 0) > 0
    most = tl.where(undefined, float("nan"), tl.maximum(tl.max(tl.abs(held), 0), LEAST))
    step = most * (1.0 / MOST)
    if gate is not None:
        opened = tl.load(gate + row).to(tl.float32)
        step *= opened
        total *= opened
    tl.store(scale + row, step)
    tl.store(added + row, total)
    tl.store(quantised + row * WIDTH + column, round_to_fp8(held * tl.div_rn(MOST, most)), mask=within)


@triton.jit(do_not_specialize=["rows"])
def quantise_columns_kernel(
    x,
    level,
    quantised,
    rows,
    stride,
    WIDTH: tl.constexpr,  # K
    ROWS: tl.constexpr,  # rows of a program
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < WIDTH
    inside = (row < rows)[:, None] & within[None, :]
    held = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(level + column, mask=within, other=0.0)
    tl.store(quantised + row[:, None] * WIDTH + column[None, :], round_to_fp8(held * factor[None, :]), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quantised_norm_kernel(
    x,
    normed,
    rows,
    stride,
    eps,
    WIDTH: tl.constexpr,  # D
    LEVEL: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    inside = (row < rows)[:, None] & within[None, :]
    held = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(held, 1) / WIDTH
    centred = tl.where(within[None, :], held - mean[:, None], 0.0)
    spread = tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)
    tl.store(
        normed + row[:, None] * WIDTH + column[None, :],
        round_to_fp8(centred * (LEVEL / spread)[:, None]),
        mask=inside,
    )


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.backbone.quantise.quantise_rows` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not computes_in_fp8(x.device):
        return quantise_rows_reference(x)
    rows, width = x.shape
    quantised = x.new_empty(*x.shape, dtype=FP8)
    scale = x.new_empty(rows, dtype=torch.float32)
    if rows:
        x = unit_stride(x)
        block = min(PART, triton.next_power_of_2(width))
        warps = max(1, block // 512)
        quantise_rows_kernel[(rows,)](x, quantised, scale, x.stride(0), WIDTH=width, BLOCK=block, num_warps=warps)
    return quantised, scale


def quantise_layer(
    quantised: Tensor,
    scale: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    shift: Tensor | None,
    gate: Tensor | None,
) -> None:
    """`mdkern.kernels.backbone.quantise.quantise_layer` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(weight) or not computes_in_fp8(weight.device):
        quantise_layer_reference(quantised, scale, added, weight, bias, factor, shift, gate)
        return
    rows, width = weight.shape
    weight = unit_stride(weight)
    vectors = (unit_stride(vector) for vector in (bias, factor, shift, gate))
    block = triton.next_power_of_2(width)
    if rows:
        quantise_layer_kernel[(rows,)](
            weight, *vectors, quantised, scale, added, weight.stride(0), WIDTH=width, BLOCK=block, num_warps=4
        )


def quantise_columns(x: Tensor, level: Tensor) -> Tensor:
    """`mdkern.kernels.backbone.quantise.quantise_columns` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not computes_in_fp8(x.device):
        return quantise_columns_reference(x, level)
    quantised = x.new_empty(*x.shape, dtype=FP8)
    if quantised.numel():
        x, (rows, width) = unit_stride(x), x.shape
        block = min(1024, triton.next_power_of_2(width))
        grid = triton.cdiv(rows, 4), triton.cdiv(width, block)
        warps = max(1, block // 256)
        quantise_columns_kernel[grid](
            x, unit_stride(level), quantised, rows, x.stride(0), WIDTH=width, ROWS=4, BLOCK=block, num_warps=warps
        )
    return quantised


def quantised_norm(x: Tensor, rows_of_program: int | None = None, warps: int | None = None) -> Tensor:
    """`mdkern.kernels.backbone.quantise.quantised_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(x) or not computes_in_fp8(x.device):
        return quantised_norm_reference(x)
    rows, width = x.shape
    normed = x.new_empty(*x.shape, dtype=FP8)
    if not normed.numel():
        return normed
    x = unit_stride(x)
    rows_of_program = rows_of_program or (2 if rows_to_choose_by(rows) >= 4096 else 1)
    block = triton.next_power_of_2(width)
    quantised_norm_kernel[(triton.cdiv(rows, rows_of_program),)](
        x,
        normed,
        rows,
        x.stride(0),
        EPS,
        WIDTH=width,
        LEVEL=norm_level(width),
        ROWS=rows_of_program,
        BLOCK=block,
        num_warps=warps or min(8, max(1, block // 512)),
    )
    return normed
