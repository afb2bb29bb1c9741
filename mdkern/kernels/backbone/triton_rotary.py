"""`mdkern.kernels.backbone.rotary` in Triton: each program rotates all heads of a few rows."""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.rotary import gathered_qkv_outputs, gathered_qkv_reference, rotary_reference
from mdkern.kernels.invariant import rows_to_choose_by


@triton.jit
def _rotate_heads(
    source,  # address of each row, [ROWS]
    target,
    cos,
    sin,
    position,
    positions,  # P
    readable,
    writable,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """Rotate the first `HEADS` heads of some rows. Rows that cannot be read or have no such position become NaN."""
    dimension = tl.arange(0, HALF_BLOCK)
    half = (dimension < HALF)[None, None, :]
    readable = readable[:, None, None] & half
    writable = writable[:, None, None] & half
    angle = (position * HALF)[:, None, None] + dimension[None, None, :]
    there = writable & ((position >= 0) & (position < positions))[:, None, None]
    c = tl.load(cos + angle, mask=there, other=float("nan"))  # [ROWS, 1, HALF_BLOCK]
    s = tl.load(sin + angle, mask=there, other=float("nan"))
    for start in tl.static_range(0, HEADS, HEAD_BLOCK):
        head = start + tl.arange(0, HEAD_BLOCK)
        inside = (head < HEADS)[None, :, None]
        at = (head * (2 * HALF))[None, :, None] + dimension[None, None, :]
        read = source[:, None, None] + at
        first = tl.load(read, mask=readable & inside, other=float("nan")).to(tl.float32)
        second = tl.load(read + HALF, mask=readable & inside, other=float("nan")).to(tl.float32)
        write = target[:, None, None] + at
        element = target.dtype.element_ty
        tl.store(write, (first * c - second * s).to(element), mask=writable & inside)
        tl.store(write + HALF, (second * c + first * s).to(element), mask=writable & inside)


@triton.jit
def _copy(source, target, readable, writable, FIRST: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the columns of some rows from `FIRST` on. Rows that cannot be read become NaN."""
    for start in tl.static_range(FIRST, COLUMNS, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = column < COLUMNS
        held = tl.load(source[:, None] + column, mask=readable[:, None] & inside, other=float("nan"))
        tl.store(target[:, None] + column, held, mask=writable[:, None] & inside)


@triton.jit(do_not_specialize=["rows", "length", "table_rows"])
def rotary_kernel(
    x,
    cos,
    sin,
    positions,
    rows,  # N
    length,  # without positions, row n is at position n % length
    table_rows,  # P
    stride,  # of a row of x
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2
    ROWS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    position = row % length if positions is None else tl.load(positions + row, mask=real, other=0).to(tl.int64)
    at = x + row * stride
    _rotate_heads(at, at, cos, sin, position, table_rows, real, real, HEADS, HALF, HEAD_BLOCK, HALF_BLOCK)


@triton.jit(do_not_specialize=["rows", "table_rows", "length"])
def gathered_qkv_kernel(
    embedding,
    table,
    row_index,
    cos,
    sin,
    x,
    qkv,
    rows,  # N
    table_rows,
    length,
    embedding_stride,
    table_stride,
    WIDTH: tl.constexpr,  # of the embedding
    COLUMNS: tl.constexpr,  # of the table
    HEADS: tl.constexpr,  # that are rotated
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    index = tl.load(row_index + row, mask=real, other=0).to(tl.int64)
    inside = real & (index >= 0) & (index < table_rows)
    _copy(embedding + index * embedding_stride, x + row * WIDTH, inside, real, 0, WIDTH, COLUMN_BLOCK)
    source, target = table + index * table_stride, qkv + row * COLUMNS
    _rotate_heads(source, target, cos, sin, row % length, length, inside, real, HEADS, HALF, HEAD_BLOCK, HALF_BLOCK)
    _copy(source, target, inside, real, 2 * HALF * HEADS, COLUMNS, COLUMN_BLOCK)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    length: int,
    rows_of_program: int | None = None,
    head_block: int | None = None,
    warps: int = 4,
) -> None:
    """`rotary` on a GPU (or, on the CPU, in Triton's interpreter)."""
    rows, heads, head_dim = x.shape
    if x.dtype == torch.float64:
        rotary_reference(x, cos, sin, positions, length)
        return
    if rows == 0 or heads == 0:
        return
    half_block = triton.next_power_of_2(head_dim // 2)
    head_block = head_block or min(8, triton.next_power_of_2(heads))
    most = 4 if rows_to_choose_by(rows) >= 4096 else 1
    rows_of_program = rows_of_program or max(1, min(most, 1024 // (head_block * half_block)))
    rotary_kernel[(triton.cdiv(rows, rows_of_program),)](
        x,
        cos,
        sin,
        None if positions is None else positions.contiguous(),
        rows,
        max(length, 1),
        cos.shape[0],
        x.stride(0),
        HEADS=heads,
        HALF=head_dim // 2,
        ROWS=rows_of_program,
        HEAD_BLOCK=head_block,
        HALF_BLOCK=half_block,
        num_warps=warps,
    )


def gathered_qkv(
    embedding: Tensor, table: Tensor, row_index: Tensor, cos: Tensor, sin: Tensor, heads: int, length: int
) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.backbone.rotary.gathered_qkv` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if table.dtype == torch.float64:
        return gathered_qkv_reference(embedding, table, row_index, cos, sin, heads, length)
    rows, half = row_index.shape[0], cos.shape[1]
    x, qkv = gathered_qkv_outputs(embedding, table, row_index)
    if rows:
        rows_of_program = 4 if rows_to_choose_by(rows) >= 4096 else 1
        gathered_qkv_kernel[(triton.cdiv(rows, rows_of_program),)](
            embedding,
            table,
            row_index.contiguous(),
            cos,
            sin,
            x,
            qkv,
            rows,
            table.shape[0],
            length,
            embedding.stride(0),
            table.stride(0),
            WIDTH=embedding.shape[1],
            COLUMNS=table.shape[1],
            HEADS=heads,
            HALF=half,
            ROWS=rows_of_program,
            HEAD_BLOCK=8,
            HALF_BLOCK=triton.next_power_of_2(half),
            COLUMN_BLOCK=256,
            num_warps=4,
        )
    return x, qkv
