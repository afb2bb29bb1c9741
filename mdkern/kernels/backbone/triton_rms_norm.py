"""`mdkern.kernels.backbone.rms_norm` in Triton: each program holds a whole row in registers."""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mdkern.kernels.backbone.modulated_norm import fits, gathered_norm_outputs
from mdkern.kernels.backbone.rms_norm import (
    gathered_rms_norm_reference,
    gathered_scaled_outputs,
    gathered_scaled_rms_norm_reference,
    rms_norm_reference,
    scaled_rms_norm_reference,
)
from mdkern.kernels.backbone.scaled_linear import new_scaled
from mdkern.kernels.backbone.triton_modulated_norm import unit_stride
from mdkern.kernels.backbone.triton_scaled import scale_and_inverse
from mdkern.kernels.device import launches_early

FEW_ROWS = 128  # they leave multiprocessors idle, so that a row is given more warps


@triton.jit
def _sum_and_largest(sum_a, most_a, sum_b, most_b):
    return sum_a + sum_b, tl.maximum(most_a, most_b)


@triton.jit(do_not_specialize=["table_rows"])
def rms_norm_kernel(
    x,  # the rows, or the table that they are gathered from
    row_index,
    update,
    weight,
    stream,  # output: the rows after gathering or updating
    normed,
    scales,  # of `normed`, if that is e4m3
    table_rows,
    x_stride,
    update_stride,
    part_stride,
    eps,
    PARTS: tl.constexpr,  # of the update
    WIDTH: tl.constexpr,  # D
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,  # launched before the kernel before it has ended
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    multiplier = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if row_index is None:
        held = tl.load(x + row * x_stride + column, mask=within, other=0.0)
    else:
        source = tl.load(row_index + row).to(tl.int64)
        known = (source >= 0) & (source < table_rows)
        held = tl.load(x + source * x_stride + column, mask=within & known, other=float("nan"))
    if update is not None:
        read = update + row * update_stride + column
        change = tl.load(read, mask=within, other=0.0).to(tl.float32)
        for _ in tl.static_range(1, PARTS):
            read += part_stride
            change += tl.load(read, mask=within, other=0.0)
        held = (held.to(tl.float32) + change).to(held.dtype)
    if (update is not None) or (row_index is not None):
        tl.store(stream + row * WIDTH + column, held, mask=within)
    wide = tl.where(within, held.to(tl.float32), 0.0)
    if scales is None:
        spread = tl.sqrt_rn(tl.sum(wide * wide, 0) / WIDTH + eps)
        result = wide * (1.0 / spread) * multiplier
        tl.store(normed + row * WIDTH + column, result.to(normed.dtype.element_ty), mask=within)
    else:  # what a row is divided by cancels out of its numbers in e4m3, so that one reduction is enough
        weighted = wide * multiplier
        squares, most = tl.reduce((wide * wide, tl.abs(weighted)), 0, _sum_and_largest)
        scale, inverse = scale_and_inverse(most)
        tl.store(scales + row, scale / tl.sqrt_rn(squares / WIDTH + eps))
        tl.store(normed + row * WIDTH + column, (weighted * inverse).to(normed.dtype.element_ty), mask=within)


def launch(
    x: Tensor,
    row_index: Tensor | None,
    update: Tensor | None,
    weight: Tensor,
    eps: float,
    stream: Tensor,
    normed: Tensor,
    scales: Tensor | None = None,
) -> None:
    rows, width = normed.shape
    if rows == 0 or width == 0:
        return
    block = triton.next_power_of_2(width)
    parts = len(update) if update is not None and update.ndim == 3 else 1
    early = parts > 1 and update.element_size() == 2 and launches_early(x.device)
    early = early and weight.stride(-1) == 1  # else it is written just now, and must not be read at once
    rms_norm_kernel[(rows,)](
        x,
        row_index,
        update,
        unit_stride(weight),
        stream,
        normed,
        scales,
        x.shape[0],
        x.stride(0),
        0 if update is None else update.stride(-2),
        update.stride(0) if parts > 1 else 0,
        eps,
        PARTS=parts,
        WIDTH=width,
        BLOCK=block,
        EARLY=early,
        launch_pdl=early,
        num_warps=min(16, max(1, block // (512 if scales is None or rows > FEW_ROWS else 256))),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, update: Tensor | None) -> Tensor:
    """`rms_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(x):
        return rms_norm_reference(x, weight, eps, update)
    normed = torch.empty_like(x)
    launch(x, None, unit_stride(update), weight, eps, x, normed)
    return normed


def gathered_rms_norm(table: Tensor, row_index: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.backbone.rms_norm.gathered_rms_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(table):
        return gathered_rms_norm_reference(table, row_index, weight, eps)
    x, normed = gathered_norm_outputs(table, row_index)
    launch(unit_stride(table), row_index.contiguous(), None, weight, eps, x, normed)
    return x, normed


def scaled_rms_norm(x: Tensor, weight: Tensor, eps: float, update: Tensor | None) -> tuple[Tensor, Tensor]:
    """`scaled_rms_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(x):
        return scaled_rms_norm_reference(x, weight, eps, update)
    values, scales = new_scaled(x)
    launch(x, None, unit_stride(update), weight, eps, x, values, scales)
    return values, scales


def gathered_scaled_rms_norm(
    table: Tensor, row_index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`gathered_scaled_rms_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(table):
        return gathered_scaled_rms_norm_reference(table, row_index, weight, eps)
    x, values, scales = gathered_scaled_outputs(table, row_index)
    launch(unit_stride(table), row_index.contiguous(), None, weight, eps, x, values, scales)
    return x, values, scales
