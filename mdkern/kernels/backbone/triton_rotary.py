"""`mdkern.kernels.backbone.rotary` in Triton: a program turns all heads of a few rows, whose sines it reads once."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(
    source,  # of each row, [ROWS]
    target,
    cos,
    sin,
    position,
    readable,
    writable,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """The first heads of some rows. What cannot be read is NaN."""
    dimension = tl.arange(0, HALF_BLOCK)
    half = (dimension < HALF)[None, None, :]
    readable = readable[:, None, None] & half
    writable = writable[:, None, None] & half
    angle = (position * HALF)[:, None, None] + dimension[None, None, :]
    c = tl.load(cos + angle, mask=writable, other=1.0)  # [ROWS, 1, HALF_BLOCK]
    s = tl.load(sin + angle, mask=writable, other=0.0)
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
    """The columns of some rows from `FIRST` on. What cannot be read is NaN."""
    for start in tl.static_range(FIRST, COLUMNS, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = column < COLUMNS
        held = tl.load(source[:, None] + column, mask=readable[:, None] & inside, other=float("nan"))
        tl.store(target[:, None] + column, held, mask=writable[:, None] & inside)


@triton.jit(do_not_specialize=["rows", "length"])
def _rotate(
    x,
    cos,
    sin,
    positions,
    rows,  # N
    length,  # row n is at n % length, where no positions are given
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
    _turn(at, at, cos, sin, position, real, real, HEADS, HALF, HEAD_BLOCK, HALF_BLOCK)


@triton.jit(do_not_specialize=["rows", "table_rows", "length"])
def _gather(
    embedding,
    table,
    row_index,
    cos,
    sin,
    x,
    product,
    rows,  # N
    table_rows,
    length,
    embedding_stride,
    table_stride,
    WIDTH: tl.constexpr,  # of the embedding
    COLUMNS: tl.constexpr,  # of the table
    HEADS: tl.constexpr,  # that are turned
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
    source, target = table + index * table_stride, product + row * COLUMNS
    _turn(source, target, cos, sin, row % length, inside, real, HEADS, HALF, HEAD_BLOCK, HALF_BLOCK)
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
    """`mdkern.kernels.backbone.rotary` on a GPU (or, on the CPU, in Triton's interpreter)."""
    rows, heads, head_dim = x.shape
    if rows == 0 or heads == 0:
        return
    half_block = triton.next_power_of_2(head_dim // 2)
    head_block = head_block or min(8, triton.next_power_of_2(heads))
    rows_of_program = rows_of_program or max(1, min(4 if rows >= 4096 else 1, 1024 // (head_block * half_block)))
    _rotate[(triton.cdiv(rows, rows_of_program),)](
        x,
        cos,
        sin,
        None if positions is None else positions.contiguous(),
        rows,
        max(length, 1),
        x.stride(0),
        HEADS=heads,
        HALF=head_dim // 2,
        ROWS=rows_of_program,
        HEAD_BLOCK=head_block,
        HALF_BLOCK=half_block,
        num_warps=warps,
    )


def gathered_heads(
    embedding: Tensor, table: Tensor, row_index: Tensor, cos: Tensor, sin: Tensor, heads: int, length: int
) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.gathered_heads` on a GPU (or, on the CPU, in Triton's interpreter)."""
    rows, half = row_index.shape[0], cos.shape[1]
    x, product = embedding.new_empty(rows, embedding.shape[1]), table.new_empty(rows, table.shape[1])
    if rows:
        rows_of_program = 4 if rows >= 4096 else 1
        _gather[(triton.cdiv(rows, rows_of_program),)](
            embedding,
            table,
            row_index.contiguous(),
            cos,
            sin,
            x,
            product,
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
    return x, product
