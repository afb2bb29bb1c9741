"""`divergence` in Triton: one pass over both output layers that never writes a logit to memory.

Each program computes the same tile of rows and ids with both heads and keeps a few numbers for each row. With x a logit
of p and m the largest so far, and y and n those of q, they are the sums of exp(x - m), of exp(y - n), of
exp(x - m) * ((x - m) - (y - n)) and of exp(x - m) * (y - n). The last two give the KL divergence and the cross-entropy,
up to the logarithms of the first two. Summing differences keeps precision where the heads are nearly equal. A second
kernel combines the parts of the vocabulary for each row.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from mdkern.kernels.triton_common import IMPOSSIBLE, LN2, LOG2E, LOWEST, load_row_index, tile_logits

PARTS = tl.constexpr(7)  # floats for each row and part of the vocabulary


@triton.jit
def _advance(state, top, other_top):
    """Convert the sums to new maxima."""
    old_top, total, old_other, other_total, gap, cross, escaped = state
    shift, other_shift = old_top - top, old_other - other_top
    rescale = tl.exp2(shift * LOG2E)
    gap = (gap + total * (shift - other_shift)) * rescale
    cross = (cross + total * other_shift) * rescale
    return top, total * rescale, other_top, other_total * tl.exp2(other_shift * LOG2E), gap, cross, escaped


@triton.jit
def _absorb(x, y, state, EXCLUDES: tl.constexpr):
    """Fold a tile of logits of both heads, ``[BM, BN]``, into the running sums."""
    state = _advance(state, tl.maximum(state[0], tl.max(x, 1)), tl.maximum(state[2], tl.max(y, 1)))
    top, total, other_top, other_total, gap, cross, escaped = state
    a, b = x - top[:, None], y - other_top[:, None]
    e = tl.exp2(a * LOG2E)
    total += tl.sum(e, 1)
    other_total += tl.sum(tl.exp2(b * LOG2E), 1)
    if EXCLUDES:  # ids with q = 0 are treated apart: KL is infinite if p is above 0 at the most probable of them
        out = y == LOWEST
        escaped = tl.maximum(escaped, tl.max(tl.where(out, x, LOWEST), 1))
        b = tl.where(out, 0.0, b)
    gap += tl.sum(e * (a - b), 1)
    cross += tl.sum(e * b, 1)
    return top, total, other_top, other_total, gap, cross, escaped


@triton.jit(do_not_specialize=["count", "vocab", "hidden_rows", "chunk"])
def divergence_kernel(
    hidden,
    weight,
    weight_scale,
    bias,
    hidden_dim,
    hidden_stride,
    weight_stride,
    scale,
    soft_cap,
    other_hidden,
    other_weight,
    other_weight_scale,
    other_bias,
    other_hidden_dim,
    other_hidden_stride,
    other_weight_stride,
    other_scale,
    other_soft_cap,
    row_index,
    parts,  # [splits, PARTS, M]
    count,
    vocab,
    hidden_rows,  # N
    chunk,  # number of vocabulary tiles of a program
    BM: tl.constexpr,
    BN: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    OTHER_BK: tl.constexpr,
    OTHER_EVEN_K: tl.constexpr,
    OTHER_HIDDEN_TMA: tl.constexpr,
    OTHER_WEIGHT_TMA: tl.constexpr,
    OTHER_FROM_LOGITS: tl.constexpr,
    OTHER_HAS_SCALE: tl.constexpr,
    OTHER_HAS_CAP: tl.constexpr,
    OTHER_PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(count, BM)
    row_tile = tl.program_id(0) % row_tiles
    split = tl.program_id(0) // row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    valid = rows < count
    index, total = load_row_index(row_index, rows, valid, hidden_rows)
    nothing = tl.zeros([BM], tl.float32)
    lowest = tl.full([BM], LOWEST, tl.float32)
    state = lowest, total, lowest, nothing, nothing, nothing, lowest
    first = split * chunk
    for tile in range(first, tl.minimum(first + chunk, tl.cdiv(vocab, BN))):
        x = tile_logits(
            hidden, weight, weight_scale, bias, index, row_tile, tile, vocab, hidden_dim, hidden_stride, weight_stride,
            scale, soft_cap, BM, BN, BK, EVEN_K, HIDDEN_TMA, WEIGHT_TMA, FROM_LOGITS, HAS_SCALE, HAS_CAP, PRECISION,
        )  # fmt: skip
        y = tile_logits(
            other_hidden, other_weight, other_weight_scale, other_bias, index, row_tile, tile, vocab, other_hidden_dim,
            other_hidden_stride, other_weight_stride, other_scale, other_soft_cap, BM, BN, OTHER_BK, OTHER_EVEN_K,
            OTHER_HIDDEN_TMA, OTHER_WEIGHT_TMA, OTHER_FROM_LOGITS, OTHER_HAS_SCALE, OTHER_HAS_CAP, OTHER_PRECISION,
        )  # fmt: skip
        state = _absorb(x, y, state, EXCLUDES)
    at = parts + split.to(tl.int64) * PARTS * count + rows
    for i in tl.static_range(PARTS):
        tl.store(at + i * count, state[i], mask=valid)


@triton.jit(do_not_specialize=["count", "splits"])
def divergence_reduce_kernel(parts, kl, cross_entropy, count, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    inside = (rows < count)[:, None] & (split < splits)[None, :]
    at = parts + split.to(tl.int64)[None, :] * PARTS * count + rows[:, None]
    state = (
        tl.load(at, mask=inside, other=LOWEST),
        tl.load(at + count, mask=inside, other=0.0),
        tl.load(at + 2 * count, mask=inside, other=LOWEST),
        tl.load(at + 3 * count, mask=inside, other=0.0),
        tl.load(at + 4 * count, mask=inside, other=0.0),
        tl.load(at + 5 * count, mask=inside, other=0.0),
        tl.load(at + 6 * count, mask=inside, other=LOWEST),
    )
    top, other_top = tl.max(state[0], 1), tl.max(state[2], 1)
    _, totals, _, other_totals, gaps, crosses, likeliest = _advance(state, top[:, None], other_top[:, None])
    total, escaped = tl.sum(totals, 1), tl.max(likeliest, 1)
    log_total, log_other = tl.log2(total) * LN2, tl.log2(tl.sum(other_totals, 1)) * LN2
    kl_value = tl.sum(gaps, 1) / total - log_total + log_other
    cross_value = log_other - tl.sum(crosses, 1) / total
    # A NaN in either head stays NaN, and so do rows in which a head excludes every id.
    excluded = (escaped > IMPOSSIBLE) & (tl.exp2((escaped - top - log_total) * LOG2E) > 0.0) & (kl_value == kl_value)
    good = (top > IMPOSSIBLE) & (other_top > IMPOSSIBLE)
    kl_value = tl.where(good, tl.where(excluded, float("inf"), kl_value), float("nan"))
    cross_value = tl.where(good, tl.where(excluded, float("inf"), cross_value), float("nan"))
    tl.store(kl + rows, kl_value, mask=rows < count)
    tl.store(cross_entropy + rows, cross_value, mask=rows < count)
