"""`mdkern.kernels.backbone.combine` in Triton: a program for each sum and block of columns."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns: 2 KiB of each row in 16 bits


@triton.jit
def combine_kernel(rows, place, weights, out, columns, out_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k)
        value = tl.load(rows + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(weights + token * K + k)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=inside)


def combine(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """`mdkern.kernels.backbone.combine` on a GPU (or, on the CPU, in Triton's interpreter)."""
    return combine_into(rows.new_empty(place.shape[0], rows.shape[1]), rows, place, weights)


def combine_into(out: Tensor, rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """The same, written to `out`, whose rows may have any stride."""
    tokens, columns = out.shape
    if tokens and columns:
        grid, constants = (tokens, triton.cdiv(columns, BLOCK)), {"K": place.shape[1], "BLOCK": BLOCK, "num_warps": 4}
        combine_kernel[grid](rows, place, weights, out, columns, out.stride(0), **constants)
    return out
