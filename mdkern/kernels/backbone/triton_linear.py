"""The products of `mdkern.kernels.backbone.linear` for about a thousand rows on a Hopper GPU, in Triton.

There the tiles of `hopper_linear` are too few for the multiprocessors, and the gaps between launches tell: each product
is launched before the kernel that it depends on has ended.
"""

# mypy: ignore-errors
# ruff: noqa: N803

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from mdkern.kernels.backbone.folded_norm import SPAN
from mdkern.kernels.backbone.norm_constants import EPS
from mdkern.kernels.backbone.triton_folded_norm import pair_sums, quad_sums
from mdkern.kernels.device import launches_early
from mdkern.kernels.triton_common import halves

DEPTH = 64  # of the inner dimension in a step
GROUP = 8  # row tiles that take all columns before the next ones begin
GELU_SCALE = tl.constexpr(2.302208198144325)  # 2 * sqrt(2 / pi) * log2(e)


class Tiling(NamedTuple):
    """Of a program: rows, columns, warps, steps loaded ahead."""

    rows: int
    columns: int
    warps: int
    stages: int


# Of products to heads, to an MLP's hidden units, and back to the stream; for streams narrower than 256 and for others.
HEADS, GELU, ADDED = Tiling(64, 128, 4, 3), Tiling(128, 128, 8, 3), Tiling(64, 128, 4, 4)
MANY_ADDED, FEW_ADDED = Tiling(128, 128, 8, 4), 1280  # and most rows for which `ADDED` is faster
NARROW_HEADS, NARROW_GELU, NARROW_ADDED = Tiling(64, 64, 4, 3), Tiling(64, 128, 4, 3), Tiling(64, 64, 4, 3)


@triton.jit
def _gelu(x, FAST: tl.constexpr):
    """GELU in the tanh form; FAST, on a GPU: with a hyperbolic tangent accurate to 2^-11, half of the other's time."""
    if FAST:
        inner = x * (0.7978845608028654 + 0.035677408136300125 * (x * x))
        tanh: tl.constexpr = "tanh.approx.f32 $0, $1;"
        turned = tl.inline_asm_elementwise(tanh, "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1)
        half = 0.5 * x
        x = half * turned + half
    else:
        inner = x * (x * x * 0.044715 + 1.0)
        x = x / (1.0 + tl.exp2(inner * -GELU_SCALE))
    return x


@triton.jit
def _row_sums(x):
    """Sum and sum of squares of each row of 64 or 128 columns, added up as `hopper_residual` adds 128."""
    if x.shape[1] == 128:
        total, squares = pair_sums(*halves(x))
    else:
        total, squares = x, x * x
    left, right = halves(quad_sums(total))
    total = left + right
    left, right = halves(quad_sums(squares))
    squares = left + right
    left, right = total.split()
    first, second = squares.split()
    return left + right, first + second


@triton.jit(do_not_specialize=["rows", "length", "rotated", "gate_rows"])
def product_kernel(
    x,  # descriptor of [N, K]
    weight,  # descriptor of [C, K]
    bias,  # [C]
    sums,  # [SPANS, 2, N] of the rows of x
    cos,
    sin,
    gate,  # [C] or [S, C]
    stream,  # [N, C], to which the gated product is added
    new_sums,  # [C / BLOCK, 2, N] of the new stream
    out,  # [N, C], if there is no stream
    rows,  # N
    length,  # row n is at position n % length
    rotated,  # columns
    gate_rows,  # rows of a gate
    gate_stride,
    eps,
    COLUMNS: tl.constexpr,  # C
    INNER: tl.constexpr,  # K
    SPANS: tl.constexpr,
    GELU: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2; 0: nothing is rotated
    GATES: tl.constexpr,  # whether each sequence has its own gate
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # of columns
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles: tl.constexpr = COLUMNS // BLOCK
    group = tile // (GROUP * column_tiles)
    within = tile % (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + within % size
    column_tile = within // size
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if sums is not None:  # read before the product, which hides what that takes
        total = tl.zeros([ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for span in tl.static_range(0, SPANS, 2):  # in pairs, so that two of 128 columns are one of `hopper_residual`
            of_pair = tl.load(sums + 2 * span * rows + row, mask=there, other=0.0)
            squares_of_pair = tl.load(sums + (2 * span + 1) * rows + row, mask=there, other=0.0)
            if span + 1 < SPANS:
                of_pair += tl.load(sums + (2 * span + 2) * rows + row, mask=there, other=0.0)
                squares_of_pair += tl.load(sums + (2 * span + 3) * rows + row, mask=there, other=0.0)
            total += of_pair
            squares += squares_of_pair
        mean = total / INNER
        over_spread = tl.rsqrt(tl.maximum(squares / INNER - mean * mean, 0.0) + eps)
    product = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(0, INNER, DEPTH):
        product = tl.dot(x.load([row_tile * ROWS, k]), weight.load([column_tile * BLOCK, k]).T, product)
    if sums is not None:
        product *= over_spread[:, None]
    if bias is not None:
        product += tl.load(bias + column).to(tl.float32)[None, :]
    if GELU:
        product = _gelu(product, FAST)
    if HALF > 0:
        left, right = product.reshape(ROWS, BLOCK // (2 * HALF), 2, HALF).permute(0, 1, 3, 2).split()
        angle = (row % length)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        turns = column_tile * BLOCK < rotated
        c = tl.load(cos + angle)[:, None, :]
        s = tl.load(sin + angle)[:, None, :]
        left, right = tl.where(turns, left * c - right * s, left), tl.where(turns, right * c + left * s, right)
        product = tl.join(left, right).permute(0, 1, 3, 2).reshape(ROWS, BLOCK)
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    if stream is None:
        tl.store(out + at, product.to(out.dtype.element_ty), mask=there[:, None])
    else:
        held = tl.load(stream + at, mask=there[:, None], other=0.0).to(tl.float32)
        if GATES:
            which = (row // gate_rows).to(tl.int64)[:, None] * gate_stride
            opened = tl.load(gate + which + column[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        else:
            opened = tl.load(gate + column).to(tl.float32)[None, :]
        product = held + opened * product
        tl.store(stream + at, product.to(stream.dtype.element_ty), mask=there[:, None])
        if new_sums is not None:
            total, squares = _row_sums(product)
            tl.store(new_sums + 2 * column_tile * rows + row, total, mask=there)
            tl.store(new_sums + (2 * column_tile + 1) * rows + row, squares, mask=there)


def launch(
    x: Tensor,
    weight: Tensor,
    tiling: Tiling,
    *,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    length: int = 1,
    rotated: int = 0,
    gelu: bool = False,
    sums: Tensor | None = None,
    gate: Tensor | None = None,
    stream: Tensor | None = None,
    new_sums: Tensor | None = None,
) -> None:
    (rows, inner), columns = x.shape, weight.shape[0]
    sequences = gate.shape[0] if gate is not None and gate.ndim == 2 else 1
    early = launches_early(x.device)
    product_kernel[(triton.cdiv(rows, tiling.rows) * (columns // tiling.columns),)](
        TensorDescriptor.from_tensor(x, [tiling.rows, DEPTH]),
        TensorDescriptor.from_tensor(weight, [tiling.columns, DEPTH]),
        bias,
        sums,
        cos,
        sin,
        gate,
        stream,
        new_sums,
        out,
        rows,
        length,
        rotated,
        rows // sequences,
        gate.stride(0) if sequences > 1 else 0,
        EPS,
        COLUMNS=columns,
        INNER=inner,
        SPANS=0 if sums is None else sums.shape[0],
        GELU=gelu,
        FAST=x.is_cuda,
        HALF=0 if cos is None else cos.shape[1],
        GATES=sequences > 1,
        ROWS=tiling.rows,
        BLOCK=tiling.columns,
        DEPTH=DEPTH,
        GROUP=GROUP,
        PDL=early,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        launch_pdl=early,
    )


def choose_tiling(width: int, columns: int, rotated: int, gelu: bool, head: int = 0) -> Tiling:
    """The tiles of a product to heads or hidden units, whole ones with either all or none of their columns rotated, and
    with whole heads."""
    narrow = width < SPAN and head <= NARROW_HEADS.columns
    wanted = (NARROW_GELU if narrow else GELU) if gelu else (NARROW_HEADS if narrow else HEADS)
    return wanted if columns % wanted.columns == rotated % wanted.columns == 0 else NARROW_HEADS


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    length: int = 1,
    rotated: int = 0,
    gelu: bool = False,
    sums: Tensor | None = None,
    tiling: Tiling | None = None,
) -> None:
    """As `launch_linear.linear`."""
    if tiling is None:
        head = 0 if cos is None else 2 * cos.shape[1]
        tiling = choose_tiling(x.shape[1], out.shape[1], rotated, gelu, head)
    launch(
        x, weight, tiling, out=out, bias=bias, cos=cos, sin=sin, length=length, rotated=rotated, gelu=gelu, sums=sums,
    )  # fmt: skip


def linear_residual(
    stream: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    sums: Tensor | None,
    tiling: Tiling | None = None,
) -> None:
    """As `launch_linear.linear_residual`. The sums are of as many columns as a tile has, `linear.span_of_sums`."""
    if tiling is None:
        width = stream.shape[1]
        spans = width / ADDED.columns if sums is None else sums.shape[0]
        wanted = ADDED if x.shape[0] <= FEW_ADDED else MANY_ADDED
        tiling = wanted if spans * wanted.columns == width and width % wanted.columns == 0 else NARROW_ADDED
    launch(x, weight, tiling, bias=bias, gate=gate, stream=stream, new_sums=sums)
