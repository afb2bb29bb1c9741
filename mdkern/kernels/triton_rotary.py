"""`mdkern.kernels.rotary` in Triton: a program turns all heads of a few rows, whose sines it reads once."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor


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
    dimension = tl.arange(0, HALF_BLOCK)
    real = row < rows
    position = row % length if positions is None else tl.load(positions + row, mask=real, other=0).to(tl.int64)
    at_angle = (position * HALF)[:, None, None] + dimension[None, None, :]
    half = real[:, None, None] & (dimension < HALF)[None, None, :]
    c = tl.load(cos + at_angle, mask=half, other=1.0)  # [ROWS, 1, HALF_BLOCK]
    s = tl.load(sin + at_angle, mask=half, other=0.0)
    for start in tl.static_range(0, HEADS, HEAD_BLOCK):
        head = start + tl.arange(0, HEAD_BLOCK)
        inside = half & (head < HEADS)[None, :, None]
        at = x + (row * stride)[:, None, None] + (head * (2 * HALF))[None, :, None] + dimension[None, None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (first * c - second * s).to(x.dtype.element_ty), mask=inside)
        tl.store(at + HALF, (second * c + first * s).to(x.dtype.element_ty), mask=inside)


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
    """`mdkern.kernels.rotary` on a GPU (or, on the CPU, in Triton's interpreter)."""
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
