"""`mdkern.kernels.backbone.modulated_norm` in Triton: each program holds a few whole rows in registers."""

# mypy: ignore-errors
# ruff: noqa: N803

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import (
    fits,
    gathered_norm_outputs,
    gathered_norm_reference,
    modulated_norm_reference,
)
from mdkern.kernels.backbone.norm_constants import EPS
from mdkern.kernels.invariant import is_batch_invariant, rows_to_choose_by


@triton.jit(do_not_specialize=["rows", "table_rows", "group"])
def modulated_norm_kernel(
    x,  # the rows, or the table that they are gathered from
    row_index,
    update,
    gate,
    weight,
    shift,
    scale,
    stream,  # output: the rows after gathering or updating
    normed,
    rows,  # N
    table_rows,
    group,  # rows that share a modulation
    x_stride,
    update_stride,
    shift_stride,  # from one sequence to the next, as of the scale and the gate
    scale_stride,
    gate_stride,
    eps,
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,  # rows of a program, which share a modulation
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    sequence = first // group
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real, within = row < rows, column < WIDTH
    inside = real[:, None] & within[None, :]
    here = row[:, None] * WIDTH + column[None, :]

    if row_index is None:
        held = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    else:
        source = tl.load(row_index + row, mask=real, other=0).to(tl.int64)
        known = (source >= 0) & (source < table_rows)
        at = x + source[:, None] * x_stride + column[None, :]
        held = tl.load(at, mask=inside & known[:, None], other=float("nan"))
    if update is not None:
        change = tl.load(update + row[:, None] * update_stride + column[None, :], mask=inside, other=0.0)
        opened = tl.load(gate + sequence * gate_stride + column, mask=within, other=0.0).to(tl.float32)
        held = (held.to(tl.float32) + opened[None, :] * change.to(tl.float32)).to(held.dtype)
    if (update is not None) or (row_index is not None):
        tl.store(stream + here, held, mask=inside)

    wide = tl.where(within[None, :], held.to(tl.float32), 0.0)
    mean = tl.sum(wide, 1) / WIDTH
    centred = tl.where(within[None, :], wide - mean[:, None], 0.0)
    spread = tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)
    one_plus_scale = 1.0 + tl.load(scale + sequence * scale_stride + column, mask=within, other=0.0).to(tl.float32)
    multiplier = one_plus_scale * tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
    added = tl.load(shift + sequence * shift_stride + column, mask=within, other=0.0).to(tl.float32)
    result = centred * (1.0 / spread)[:, None] * multiplier[None, :] + added[None, :]
    tl.store(normed + here, result.to(normed.dtype.element_ty), mask=inside)


def choose_rows(rows: int, sequences: int, constant: bool) -> int:
    """Rows of a program. Several rows read the modulation once; with few rows in all, one each keeps more
    multiprocessors busy. In the batch-invariant mode it depends only on whether the modulation is constant."""
    most = 4 if rows_to_choose_by(rows) >= 4096 else 1
    if is_batch_invariant():
        return most if constant else 1
    return most if sequences == 1 else math.gcd(most, rows // sequences)


def launch(
    x: Tensor,
    row_index: Tensor | None,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    stream: Tensor,
    normed: Tensor,
    rows_of_program: int | None = None,
    warps: int | None = None,
) -> None:
    rows, width = normed.shape
    if rows == 0 or width == 0:
        return
    sequences = shift.shape[0] if shift.ndim == 2 else 1
    rows_of_program = rows_of_program or choose_rows(rows, sequences, shift.ndim == 1)
    block = triton.next_power_of_2(width)
    shift, scale, gate = unit_stride(shift), unit_stride(scale), unit_stride(gate)
    modulated_norm_kernel[(triton.cdiv(rows, rows_of_program),)](
        x,
        row_index,
        update,
        gate,
        unit_stride(weight),
        shift,
        scale,
        stream,
        normed,
        rows,
        x.shape[0],
        rows // sequences,
        x.stride(0),
        0 if update is None else update.stride(0),
        shift.stride(0) if sequences > 1 else 0,
        scale.stride(0) if sequences > 1 else 0,
        gate.stride(0) if sequences > 1 and gate is not None else 0,
        EPS,
        WIDTH=width,
        ROWS=rows_of_program,
        BLOCK=block,
        num_warps=warps or min(8, max(1, block // 256)),
    )


def unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def modulated_norm(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None
) -> Tensor:
    """`modulated_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(x):
        return modulated_norm_reference(x, weight, shift, scale, update, gate)
    normed = torch.empty_like(x)
    launch(x, None, unit_stride(update), gate, weight, shift, scale, x, normed)
    return normed


def gathered_norm(
    table: Tensor, row_index: Tensor, weight: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.backbone.modulated_norm.gathered_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(table):
        return gathered_norm_reference(table, row_index, weight, shift, scale)
    x, normed = gathered_norm_outputs(table, row_index)
    launch(unit_stride(table), row_index.contiguous(), None, None, weight, shift, scale, x, normed)
    return x, normed
