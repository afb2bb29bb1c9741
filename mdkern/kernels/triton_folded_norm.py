"""`mdkern.kernels.folded_norm` in Triton: a program holds a row of a weight, or a row of the stream, in registers."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.folded_norm import NEAR_ZERO, ROUNDS, SPAN, new_sums
from mdkern.kernels.triton_modulated_norm import unit_stride


@triton.jit
def _fold(
    weight,
    bias,
    norm_weight,
    shift,
    scale,
    folded,
    added,
    stride,  # of a row of the weight
    WIDTH: tl.constexpr,  # D
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
    NEAR_ZERO: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    held = tl.load(weight + row * stride + column, mask=within, other=0.0).to(tl.float32)
    offset = tl.sum(held * tl.load(shift + column, mask=within, other=0.0).to(tl.float32), 0)
    if bias is not None:
        offset += tl.load(bias + row).to(tl.float32)
    tl.store(added + row, offset.to(added.dtype.element_ty))

    one_plus_scale = 1.0 + tl.load(scale + column, mask=within, other=0.0).to(tl.float32)
    exact = held * (one_plus_scale * tl.load(norm_weight + column, mask=within, other=0.0).to(tl.float32))
    exact = tl.where(within, exact - tl.sum(exact, 0) / WIDTH, 0.0)
    near = within & (tl.abs(exact) < NEAR_ZERO * tl.sqrt(tl.sum(exact * exact, 0) / WIDTH))
    near = tl.where(tl.sum(near.to(tl.int32), 0) > 0, near, within)
    count = tl.sum(near.to(tl.float32), 0)
    for _ in tl.static_range(ROUNDS):
        rounded = exact.to(folded.dtype.element_ty).to(tl.float32)
        exact -= tl.where(near, tl.sum(rounded, 0) / count, 0.0)
    rounded = exact.to(folded.dtype.element_ty).to(tl.float32)
    smallest = tl.argmin(tl.where(within, tl.abs(exact), float("inf")), 0)
    rounded = tl.where(column == smallest, rounded - tl.sum(rounded, 0), rounded)
    tl.store(folded + row * WIDTH + column, rounded.to(folded.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["rows", "table_rows"])
def _gather(
    table,
    row_index,
    x,
    sums,
    rows,  # N
    table_rows,
    stride,  # of a row of the table
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    source = tl.load(row_index + row, mask=real, other=0).to(tl.int64)
    inside = (real & (source >= 0) & (source < table_rows))[:, None]
    for span in tl.static_range(SPANS):
        column = (span * SPAN + tl.arange(0, SPAN))[None, :]
        held = tl.load(table + source[:, None] * stride + column, mask=inside, other=float("nan"))
        tl.store(x + row[:, None] * (SPANS * SPAN) + column, held, mask=real[:, None])
        wide = held.to(tl.float32)
        at = sums + 2 * span * rows.to(tl.int64) + row
        tl.store(at, tl.sum(wide, 1), mask=real)
        tl.store(at + rows, tl.sum(wide * wide, 1), mask=real)


def fold_norm(
    folded: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    shift: Tensor,
    scale: Tensor,
) -> None:
    """`mdkern.kernels.fold_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    rows, width = weight.shape
    weight = unit_stride(weight)
    block = triton.next_power_of_2(width)
    vectors = (unit_stride(vector) for vector in (bias, norm_weight, shift, scale))
    _fold[(rows,)](
        weight,
        *vectors,
        folded,
        added,
        weight.stride(0),
        WIDTH=width,
        BLOCK=block,
        ROUNDS=ROUNDS,
        NEAR_ZERO=NEAR_ZERO,
        num_warps=4,
    )


def gathered_sums(table: Tensor, row_index: Tensor) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.gathered_sums` on a GPU (or, on the CPU, in Triton's interpreter)."""
    rows, width = row_index.shape[0], table.shape[1]
    table, x = unit_stride(table), table.new_empty(rows, width)
    sums = new_sums(x)
    if rows:
        rows_of_program = 4
        _gather[(triton.cdiv(rows, rows_of_program),)](
            table,
            row_index.contiguous(),
            x,
            sums,
            rows,
            table.shape[0],
            table.stride(0),
            SPANS=width // SPAN,
            SPAN=SPAN,
            ROWS=rows_of_program,
            num_warps=4,
        )
    return x, sums
