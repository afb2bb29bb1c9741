"""A tile of an output layer's logits, for the kernels that look at logits more than once or at two heads together."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.2676506002282294e30)  # stands for -inf, as in `triton_projection`
IMPOSSIBLE = tl.constexpr(-5.0e29)  # anything at or below it counts as -inf


@triton.jit
def tile_logits(
    hidden,  # [N, D], or a descriptor of the M gathered rows
    weight,  # [V, D], or a descriptor of it; not looked at with FROM_LOGITS
    bias,  # [V] or None
    index,  # [BM] rows of `hidden`, int64
    row_tile,  # with HIDDEN_TMA: which tile of the gathered rows
    tile,
    columns,
    depth,
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
    """Scaled, capped and biased logits ``[BM, BN]`` of ids ``tile * BN ...``, float32; LOWEST for -inf and past V."""
    ids = tile * BN + tl.arange(0, BN)
    if FROM_LOGITS:
        at = hidden + index[:, None] * hidden_stride + ids[None, :]
        x = tl.load(at, mask=ids[None, :] < columns, other=LOWEST).to(tl.float32)
        x = tl.where(x < LOWEST, LOWEST, x)
    else:
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(0, tl.cdiv(depth, BK)):
            inner = k * BK + tl.arange(0, BK)
            if HIDDEN_TMA:
                h = hidden.load([row_tile * BM, k * BK])
            elif EVEN_K:
                h = tl.load(hidden + index[:, None] * hidden_stride + inner[None, :])
            else:
                h = tl.load(
                    hidden + index[:, None] * hidden_stride + inner[None, :], mask=inner[None, :] < depth, other=0.0
                )
            if WEIGHT_TMA:
                w = weight.load([tile * BN, k * BK])
            else:
                inside = ids[:, None] < columns
                if not EVEN_K:
                    inside = inside & (inner[None, :] < depth)
                at = weight + ids.to(tl.int64)[:, None] * weight_stride + inner[None, :]
                w = tl.load(at, mask=inside, other=0.0)
            x = tl.dot(h, w.T, x, input_precision=PRECISION)
    if HAS_SCALE:
        x = x * scale
    if HAS_CAP:
        x = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / soft_cap))))
    if bias is not None:
        shift = tl.load(bias + ids, mask=ids < columns, other=LOWEST)
        x += tl.where(shift < LOWEST, LOWEST, shift)[None, :]
    x = tl.where(ids[None, :] < columns, x, LOWEST)  # past the vocabulary scale and cap have been at work
    return tl.where(x < IMPOSSIBLE, LOWEST, x)


@triton.jit
def _merge_top2(a1, a2, b1, b2):
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@triton.jit
def largest_two(x):
    """Largest and second largest of each row of ``[BM, BN]``, the same number twice if it occurs twice."""
    left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
    return tl.reduce((tl.maximum(left, right), tl.minimum(left, right)), 1, _merge_top2)
