"""`mdkern.kernels.backbone.skinny` in Triton, and `joint` for a few rows: each program has some columns of one weight
and all rows of x.

The weights are the left operand of the product, so that a matrix instruction, which takes 64 rows of its left operand
at least, is full of them; the few rows of x are its columns.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, SIM102  (conditions of the compiler's and of the program's are apart)

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.joint import joint_linear_reference, joint_swiglu_reference, new_linear, new_swiglu
from mdkern.kernels.backbone.skinny import INNER_TILE, SPLITS, fits, new_parts, skinny_parts_reference


class Tiling(NamedTuple):
    """Of a program: columns, numbers of the inner dimension in a step, steps loaded ahead, warps."""

    columns: int
    inner: int
    stages: int
    warps: int


LINEAR = Tiling(64, INNER_TILE, 3, 4)
FEW_LINEAR = Tiling(64, INNER_TILE, 4, 4)  # of at most 32 rows
GATED = Tiling(128, 64, 4, 4)
PARTS = Tiling(64, INNER_TILE, 3, 4)


@triton.jit(do_not_specialize=["rows"])
def skinny_kernel(
    x,
    first,  # weights [C, K], contiguous
    second,
    third,
    first_bias,  # of all weights or of none
    second_bias,
    third_bias,
    out,  # [N, all C], or [SPLITS, N, C]
    rows,  # N
    x_stride,
    FIRST: tl.constexpr,  # columns C of each weight
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    INNER: tl.constexpr,  # K
    GATED: tl.constexpr,  # silu(first) * second instead of one beside the other
    SPLITS: tl.constexpr,  # parts of the inner dimension
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # of columns
    BLOCK_INNER: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK  # column of the output
    split = tl.program_id(1)
    weight = first
    bias = first_bias
    local = place  # column of the weight
    if SECOND > 0 and not GATED:
        if place >= FIRST:
            weight = second
            bias = second_bias
            local = place - FIRST
    if THIRD > 0:
        if place >= FIRST + SECOND:
            weight = third
            bias = third_bias
            local = place - FIRST - SECOND
    SPAN: tl.constexpr = INNER // SPLITS
    row, column, inner = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK), tl.arange(0, BLOCK_INNER)
    there = (row < rows)[:, None]
    read = x + row[:, None].to(tl.int64) * x_stride + split * SPAN + inner[None, :]
    entry = (local + column).to(tl.int64)[:, None] * INNER + split * SPAN + inner[None, :]
    product = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
    if GATED:
        beside = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
        for k in range(0, SPAN, BLOCK_INNER):
            some = tl.trans(tl.load(read + k, mask=there, other=0.0))
            product = tl.dot(tl.load(weight + entry + k), some, product)
            beside = tl.dot(tl.load(second + entry + k), some, beside)
        if bias is not None:
            product += tl.load(bias + local + column).to(tl.float32)[:, None]
            beside += tl.load(second_bias + local + column).to(tl.float32)[:, None]
        product = product * tl.sigmoid(product) * beside
    else:
        for k in range(0, SPAN, BLOCK_INNER):
            some = tl.trans(tl.load(read + k, mask=there, other=0.0))
            product = tl.dot(tl.load(weight + entry + k), some, product)
        if bias is not None:
            added = tl.load(bias + local + column).to(tl.float32)[:, None]
            product += added if SPLITS == 1 else tl.where(split == 0, added, 0.0)
    COLUMNS: tl.constexpr = FIRST if GATED else FIRST + SECOND + THIRD
    write = out + (split * rows + row).to(tl.int64)[:, None] * COLUMNS + place + column[None, :]
    tl.store(write, tl.trans(product).to(out.dtype.element_ty), mask=there)


def whole_biases(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Sequence[Tensor] | Sequence[None]:
    """Contiguous biases of all weights, as kernels read them, with zeros where there is none; or of none."""
    if all(bias is None for bias in biases):
        return [None] * len(biases)
    return [x.new_zeros(len(weight)) if bias is None else bias.contiguous() for weight, bias in zip(weights, biases)]


def launch(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], out: Tensor, tiling: Tiling, splits: int, gated: bool
) -> Tensor:
    rows, inner = x.shape
    if not out.numel():
        return out
    biases = whole_biases(x, weights, biases)
    missing = [None] * (3 - len(weights))
    columns = [*map(len, weights), *(0 for _ in missing)]
    skinny_kernel[(out.shape[-1] // tiling.columns, splits)](
        x,
        *weights,
        *missing,
        *biases,
        *missing,
        out,
        rows,
        x.stride(0),
        FIRST=columns[0],
        SECOND=columns[1],
        THIRD=columns[2],
        INNER=inner,
        GATED=gated,
        SPLITS=splits,
        BLOCK_ROWS=max(32, triton.next_power_of_2(rows)),  # fewer rows are no faster, and one kind more to compile
        BLOCK=tiling.columns,
        BLOCK_INNER=tiling.inner,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


def skinny_linear(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    third_bias: Tensor | None,
) -> Tensor:
    """`joint_linear` of a few rows on a GPU (or, on the CPU, in Triton's interpreter)."""
    weights = [weight for weight in (first, second, third) if weight is not None]
    biases = [first_bias, second_bias, third_bias][: len(weights)]
    if not all(fits(x, weight) for weight in weights):
        return joint_linear_reference(x, first, second, third, *biases, *[None] * (3 - len(biases)))
    tiling = FEW_LINEAR if x.shape[0] <= 32 else LINEAR
    return launch(x, weights, biases, new_linear(x, first, second, third), tiling, 1, False)


def skinny_swiglu(x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """`joint_swiglu` of a few rows on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not (fits(x, gate) and fits(x, up)):
        return joint_swiglu_reference(x, gate, up, gate_bias, up_bias)
    return launch(x, [gate, up], [gate_bias, up_bias], new_swiglu(x, gate), GATED, 1, True)


def skinny_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`skinny_parts` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if not fits(x, weight):
        return skinny_parts_reference(x, weight, bias)
    return launch(x, [weight], [bias], new_parts(x, weight), PARTS, SPLITS, False)
