"""`mdkern.kernels.compact` in Triton, in one launch whose programs do not wait for each other.

Each program places the True entries of one part of the mask. Where they go depends on how many come before them, so
each program counts the entries of the whole mask itself, one byte each, which it reads from the L2 cache.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.loop.compact import compact_outputs, compact_reference


@triton.jit(do_not_specialize=["size"])
def compact_kernel(
    mask,
    row,
    count,
    size,  # B*R
    BLOCK: tl.constexpr,  # entries that a program places
    WIDTH: tl.constexpr,  # entries that a program counts at a time
):
    first = tl.program_id(0) * BLOCK
    index = first + tl.arange(0, BLOCK)
    within = index < size
    true = tl.load(mask + index, mask=within, other=0).to(tl.int32)

    even = size // 16 * 16  # shows the compiler that loads of 16 bytes do not cross this bound
    rest = even + tl.arange(0, 16)
    last = tl.load(mask + rest, mask=rest < size, other=0).to(tl.int32)
    total = tl.zeros([WIDTH], tl.int32)
    before = tl.zeros([WIDTH], tl.int32)
    for start in range(0, even, WIDTH):
        other = start + tl.arange(0, WIDTH)
        counted = tl.load(mask + other, mask=other < even, other=0).to(tl.int32)
        total += counted
        before += tl.where(other < first, counted, 0)
    end = tl.sum(total, 0) + tl.sum(last, 0)
    place = tl.sum(before, 0) + tl.sum(tl.where(rest < first, last, 0), 0) + tl.cumsum(true, 0) - 1
    tl.store(row + place, index.to(tl.int64), mask=true != 0)
    tl.store(row + index, tl.zeros([BLOCK], tl.int64), mask=within & (index >= end))
    if first == 0:
        tl.store(count, end.to(tl.int64))


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.compact` on a GPU (or, on the CPU, in Triton's interpreter)."""
    size = mask.numel()
    if size == 0:
        return compact_reference(mask)
    row, count = compact_outputs(mask)
    block = min(1024, max(32, triton.next_power_of_2(size)))
    width = min(8192, max(32, triton.next_power_of_2(size)))
    compact_kernel[(triton.cdiv(size, block),)](
        mask.contiguous(), row, count, size, BLOCK=block, WIDTH=width, num_warps=4
    )
    return row, count
