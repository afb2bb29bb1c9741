"""`mdkern.kernels.backbone.folded_norm` in Triton: each program holds one row of the weight in registers."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.folded_norm import fold_norm_reference
from mdkern.kernels.backbone.modulated_norm import fits
from mdkern.kernels.backbone.norm_constants import NEAR_ZERO, ROUNDS
from mdkern.kernels.backbone.triton_modulated_norm import unit_stride
from mdkern.kernels.triton_common import halves


@triton.jit
def pair_sums(first, second):
    """Sums and sums of squares of the entries of two tensors. The order is fixed here, not by the compiler."""
    return first + second, tl.fma(first, first, second * second)


@triton.jit
def quad_sums(x):
    """``[R, 64]`` added up to ``[R, 4]``, in a fixed order. On Hopper tensor cores each of the 16 columns that a sum is
    of lies in the registers of one thread."""
    left, right = halves(x)
    left, right = halves(left + right)
    left, right = halves(left + right)
    even, odd = (left + right).reshape(x.shape[0], 4, 2).split()
    return even + odd


@triton.jit
def fold_norm_kernel(
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


def fold_norm(
    folded: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    shift: Tensor,
    scale: Tensor,
) -> None:
    """`mdkern.kernels.backbone.folded_norm.fold_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(weight):
        fold_norm_reference(folded, added, weight, bias, norm_weight, shift, scale)
        return
    rows, width = weight.shape
    weight = unit_stride(weight)
    block = triton.next_power_of_2(width)
    vectors = (unit_stride(vector) for vector in (bias, norm_weight, shift, scale))
    fold_norm_kernel[(rows,)](
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
