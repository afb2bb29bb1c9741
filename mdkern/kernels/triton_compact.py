"""`mdkern.kernels.compact` in Triton, in one launch in which the programs do not wait for each other.

Each program places the True entries of one part of the mask. Where they go depends on how many come before them, so
it counts the whole mask itself: read from the L2 cache, a byte an entry costs less than a second launch.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _count_true(mask, first, last, WIDTH: tl.constexpr):
    count = tl.zeros([WIDTH], tl.int32)
    for start in range(first, last, WIDTH):
        index = start + tl.arange(0, WIDTH)
        count += tl.load(mask + index, mask=index < last, other=0).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _compact(
    mask,
    row,
    count,
    size,  # B*R
    BLOCK: tl.constexpr,  # entries that a program places
    WIDTH: tl.constexpr,  # entries that it counts at a time
):
    first = tl.program_id(0) * BLOCK
    before = _count_true(mask, 0, first, WIDTH)
    total = before + _count_true(mask, first, size, WIDTH)
    index = first + tl.arange(0, BLOCK)
    within = index < size
    true = tl.load(mask + index, mask=within, other=0) != 0
    place = before + tl.cumsum(true.to(tl.int32), 0) - 1
    tl.store(row + place, index.to(tl.int64), mask=true)
    tl.store(row + index, tl.zeros([BLOCK], tl.int64), mask=within & (index >= total))
    if first == 0:
        tl.store(count, total.to(tl.int64))


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.compact` on a GPU (or, on the CPU, in Triton's interpreter), of at least one entry."""
    size = mask.numel()
    row = torch.empty(size, dtype=torch.int64, device=mask.device)
    count = row.new_empty(())
    block = min(1024, max(32, triton.next_power_of_2(size)))
    width = min(8192, max(32, triton.next_power_of_2(size)))
    _compact[(triton.cdiv(size, block),)](mask.contiguous(), row, count, size, BLOCK=block, WIDTH=width, num_warps=4)
    return row, count
