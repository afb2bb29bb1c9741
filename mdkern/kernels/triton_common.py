"""Shared by the Triton kernels of the output layer: tiles of logits; ordering, merging and splitting of values.

Gluon kernels call these functions, too, where no layout has to be named.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

GROUP_SIZE = tl.constexpr(64)  # ids of a group, see `head.reference.sample_token`
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A finite number in place of -inf, so that neither differences with it nor its product with 0 are NaN. It is -2^100, as
# its product with LOG2E is exact, so that x * LOG2E - top * LOG2E is 0 in a tile of nothing else, however it is
# compiled.
LOWEST = tl.constexpr(-1.2676506002282294e30)
IMPOSSIBLE = tl.constexpr(-5.0e29)  # logits at or below it count as -inf
NOWHERE = tl.constexpr(2147483647)  # larger than every id


@triton.jit
def load_row_count(row_count, capacity):
    """Number of rows that are used, int32: `row_count`, which lies on the device, or all of them."""
    count = capacity
    if row_count is not None:
        count = tl.minimum(tl.load(row_count).to(tl.int32), capacity)
    return count


@triton.jit
def halves(x):
    """``[R, 2 * n]`` as its left and right ``[R, n]``, without moving a register."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def flip_order(bits):
    """Convert the bits of floats to int32 of the same order, or back. NaNs go to the ends."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def merge_top_two(a1, a2, b1, b2):
    """The largest and second largest of two pairs of such numbers."""
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@triton.jit
def largest_two(x):
    """Largest and second largest of each row of ``[BM, BN]``; they are equal if the largest occurs twice.

    Comparing in pairs first takes three comparisons for each logit; inserting one at a time takes four.
    """
    left, right = halves(x)
    return tl.reduce((tl.maximum(left, right), tl.minimum(left, right)), 1, merge_top_two)


@triton.jit
def load_keys(keys, rows, valid):
    """Sample, position and step of rows, uint32, which key their draws."""
    at = keys + rows.to(tl.int64) * 3
    sample = tl.load(at, mask=valid, other=0).to(tl.uint32)
    position = tl.load(at + 1, mask=valid, other=0).to(tl.uint32)
    return sample, position, tl.load(at + 2, mask=valid, other=0).to(tl.uint32)


@triton.jit
def load_row_index(row_index, rows, valid, hidden_rows):
    """Rows of `hidden`, int64, with 0 for rows outside of it; and what to add to sums: NaN for such rows, else 0."""
    index = tl.load(row_index + rows, mask=valid, other=0).to(tl.int64)
    there = (index >= 0) & (index < hidden_rows)
    return tl.where(there, index, 0), tl.where(there, 0.0, float("nan"))


@triton.jit
def from_float8(bits):
    """float32 of the bits of float8_e4m3fn, uint8, of which none is NaN. It needs no instructions for float8, which
    GPUs before compute capability 8.9 lack.

    The bits of exponent and fraction are those of a float32 with another bias of the exponent, subnormals included.
    """
    wide = bits.to(tl.uint32)
    moved = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def tile_product(
    hidden,  # [N, D], or a descriptor of the M gathered rows
    weight,  # [V, D], or a descriptor of it; uint8: the bits of float8; not read with FROM_LOGITS
    index,  # [BM] rows of `hidden`, int64
    row_tile,  # with HIDDEN_TMA: which tile of the gathered rows
    tile,
    vocab,
    hidden_dim,
    hidden_stride,
    weight_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``hidden[index] @ weight.T`` for ids from ``tile * BN`` on, float32 ``[BM, BN]``; undefined past V.

    With FROM_LOGITS it is the logits themselves, with LOWEST for -inf and past V.
    """
    ids = tile * BN + tl.arange(0, BN)
    if FROM_LOGITS:
        at = hidden + index[:, None] * hidden_stride + ids[None, :]
        x = tl.load(at, mask=ids[None, :] < vocab, other=LOWEST).to(tl.float32)
        x = tl.where(x < LOWEST, LOWEST, x)
    else:
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(0, tl.cdiv(hidden_dim, BK)):
            inner = k * BK + tl.arange(0, BK)
            if HIDDEN_TMA:
                h = hidden.load([row_tile * BM, k * BK])
            elif EVEN_K:
                h = tl.load(hidden + index[:, None] * hidden_stride + inner[None, :])
            else:
                at = hidden + index[:, None] * hidden_stride + inner[None, :]
                h = tl.load(at, mask=inner[None, :] < hidden_dim, other=0.0)
            if WEIGHT_TMA:
                w = weight.load([tile * BN, k * BK])
            else:
                inside = ids[:, None] < vocab
                if not EVEN_K:
                    inside = inside & (inner[None, :] < hidden_dim)
                at = weight + ids.to(tl.int64)[:, None] * weight_stride + inner[None, :]
                w = tl.load(at, mask=inside, other=0)
            if w.dtype == tl.uint8:
                w = from_float8(w).to(h.dtype)
            x = tl.dot(h, w.T, x, input_precision=PRECISION)
    return x


@triton.jit
def finish_logits(
    x, weight_scale, bias, ids, vocab, scale, soft_cap, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr
):  # fmt: skip
    """Apply scales, soft cap and bias to a tile's product. With a bias it is at least LOWEST, and LOWEST past V."""
    if weight_scale is not None:
        x = x * tl.load(weight_scale + ids, mask=ids < vocab, other=0.0)[None, :]
    if HAS_SCALE:
        x = x * scale
    if HAS_CAP:
        x = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / soft_cap))))
    if bias is not None:
        shift = tl.load(bias + ids, mask=ids < vocab, other=LOWEST)
        x += tl.where(shift < LOWEST, LOWEST, shift)[None, :]
    return x


@triton.jit
def tile_logits(
    hidden,
    weight,
    weight_scale,  # [V] or None
    bias,  # [V] or None
    index,
    row_tile,
    tile,
    vocab,
    hidden_dim,
    hidden_stride,
    weight_stride,
    scale,
    soft_cap,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The logits ``[BM, BN]`` of ids from ``tile * BN`` on, float32; LOWEST for -inf and past V."""
    ids = tile * BN + tl.arange(0, BN)
    x = tile_product(
        hidden, weight, index, row_tile, tile, vocab, hidden_dim, hidden_stride, weight_stride, BM, BN, BK, EVEN_K,
        HIDDEN_TMA, WEIGHT_TMA, FROM_LOGITS, PRECISION,
    )  # fmt: skip
    x = finish_logits(x, weight_scale, bias, ids, vocab, scale, soft_cap, HAS_SCALE, HAS_CAP)
    x = tl.where(ids[None, :] < vocab, x, LOWEST)
    return tl.where(x < IMPOSSIBLE, LOWEST, x)
