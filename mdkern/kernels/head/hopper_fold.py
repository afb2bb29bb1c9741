"""Folds a tile of logits into the state of its rows, in Gluon: `triton_projection._absorb` with explicit layouts.

The noise is drawn once for each row and group, and sums over a group's 64 ids are exchanged among four lanes only.
"""

# mypy: ignore-errors
# ruff: noqa: N803, RUF005

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from mdkern.kernels import triton_noise as noise
from mdkern.kernels.head.triton_projection import GREEDY
from mdkern.kernels.triton_common import GROUP_SIZE, IMPOSSIBLE, LOG2E, LOWEST, NOWHERE, halves, merge_top_two

ROWS = gl.constexpr(64)  # rows of a warpgroup

# The layout of one value for each row, in the lanes of its quad, and that of a [64, 64] group in a tensor-core result.
TILE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
ROW = gl.constexpr(gl.SliceLayout(1, TILE.value))
COLUMN = gl.constexpr(gl.SliceLayout(0, TILE.value))
# The layout of [64, 2] with each row in the lanes that hold it in `ROW`.
ROW_PAIR = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 1]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 2],
    )
)


@constexpr_function
def _pairs(groups):
    """The layout with one Philox call in each lane: 16 rows of a warp by two pairs of groups (or one pair, twice)."""
    pairs = groups // 2
    return gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, pairs - 1], [1, 0], [2, 0], [4, 0], [8, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, pairs],
    )


@gluon.jit
def _logit_groups(x, GROUPS: gl.constexpr):
    """Split ``[64, 64 * GROUPS]`` into a tuple of ``[64, 64]`` in `TILE`, without moving a register."""
    if GROUPS == 2:
        a, b = halves(x)
        return (gl.convert_layout(a, TILE, True), gl.convert_layout(b, TILE, True))
    else:
        left, right = halves(x)
        a, b = halves(left)
        c, d = halves(right)
        return (
            gl.convert_layout(a, TILE, True),
            gl.convert_layout(b, TILE, True),
            gl.convert_layout(c, TILE, True),
            gl.convert_layout(d, TILE, True),
        )


@gluon.jit
def _races(tile, seed, sample, position, step, GROUPS: gl.constexpr):
    """``1 / exponential`` for each row and group of the tile: a tuple of ``[64]`` in `ROW`."""
    layout: gl.constexpr = _pairs(GROUPS)
    pair = gl.arange(0, GROUPS // 2, layout=gl.SliceLayout(0, layout)) + tile * (GROUPS // 2)
    w0, w1, w2, w3 = noise.random_words(
        seed,
        gl.expand_dims(sample, 1),
        gl.expand_dims(position, 1),
        gl.expand_dims(step, 1),
        gl.expand_dims(pair, 0),
        noise.GROUP,
    )
    even, odd = noise.inverse_exponential(w0, w1), noise.inverse_exponential(w2, w3)  # [64, GROUPS / 2] each
    if GROUPS == 2:
        return (gl.convert_layout(even.reshape(ROWS), ROW), gl.convert_layout(odd.reshape(ROWS), ROW))
    else:
        first, third = gl.convert_layout(even, ROW_PAIR).split()
        second, fourth = gl.convert_layout(odd, ROW_PAIR).split()
        return (
            gl.convert_layout(first, ROW, True),
            gl.convert_layout(second, ROW, True),
            gl.convert_layout(third, ROW, True),
            gl.convert_layout(fourth, ROW, True),
        )


@gluon.jit
def _absorb(
    x,  # a tuple of [64, 64] logits, one per group
    tile,
    state,
    inv_temperature,
    races,
    any_greedy,
    all_unit,
    GROUPS: gl.constexpr,
    MODE: gl.constexpr,
    WANT_TOP: gl.constexpr,
    WANT_ENTROPY: gl.constexpr,
    WANT_ARGMAX: gl.constexpr,
):
    """`triton_projection._absorb`, one group after another."""
    top, total, moment, second, best, best_group, leader, top_id = state
    group_tops = ()
    if MODE == GREEDY:  # the second largest within the leading group is found at the end
        tile_top = gl.max(x[0], 1)
        tile_second = gl.full_like(tile_top, LOWEST)
        group_tops = group_tops + (tile_top,)
        for g in gl.static_range(1, GROUPS):
            group_top = gl.max(x[g], 1)
            tile_second = gl.maximum(tile_second, gl.minimum(tile_top, group_top))
            tile_top = gl.maximum(tile_top, group_top)
            group_tops = group_tops + (group_top,)
    elif WANT_TOP:
        high, low = gl.maximum(x[0], x[1]), gl.minimum(x[0], x[1])
        if GROUPS == 4:
            other_high, other_low = gl.maximum(x[2], x[3]), gl.minimum(x[2], x[3])
            low = gl.maximum(gl.minimum(high, other_high), gl.maximum(low, other_low))
            high = gl.maximum(high, other_high)
        tile_top, tile_second = gl.reduce((high, low), 1, merge_top_two)
    else:
        high = gl.maximum(x[0], x[1])
        if GROUPS == 4:
            high = gl.maximum(high, gl.maximum(x[2], x[3]))
        tile_top = gl.max(high, 1)
    if WANT_TOP:
        second = gl.maximum(gl.maximum(second, tile_second), gl.minimum(top, tile_top))

    if WANT_ARGMAX:
        column = gl.arange(0, GROUP_SIZE, layout=COLUMN)
        found = gl.full([ROWS, GROUP_SIZE], NOWHERE, gl.int32, layout=TILE)
        for g in gl.static_range(GROUPS):
            ids = (tile * GROUPS + g) * GROUP_SIZE + column
            found = gl.minimum(found, gl.where(x[g] == tile_top[:, None], ids[None, :], NOWHERE))
        top_id = gl.where(tile_top > top, gl.min(found, 1), top_id)
    old_top = top
    top = gl.maximum(top, tile_top)
    offset = top * LOG2E
    shift = (old_top - top) * LOG2E
    rescale = gl.exp2(shift)
    if WANT_ENTROPY:
        moment = (moment + total * shift) * rescale
    total = total * rescale
    weights = ()
    for g in gl.static_range(GROUPS):
        d = x[g] * LOG2E - offset[:, None]
        e = gl.exp2(d)
        weights = weights + (gl.sum(e, 1),)
        total += weights[g]
        if WANT_ENTROPY:
            if g == 0:
                first_moments = e * d
            else:
                first_moments += e * d
    if WANT_ENTROPY:
        moment += gl.sum(first_moments, 1)

    # These branches are taken for whole tiles, across which few values live. Inside the loops they spill registers.
    if MODE == GREEDY:
        scores = group_tops
    else:
        greedy = inv_temperature == 0.0
        best = gl.where(greedy, best, best * gl.exp2(shift * inv_temperature))
        if not all_unit:
            weights = _tempered(x, inv_temperature * LOG2E, offset * inv_temperature, GROUPS)
        scores = _race_scores(weights, races, GROUPS)
        if any_greedy:
            scores = _greedy_scores(x, scores, greedy, GROUPS)
    for g in gl.static_range(GROUPS):
        better = scores[g] > best
        best = gl.where(better, scores[g], best)
        best_group = gl.where(better, tile * GROUPS + g, best_group)
        leader = gl.where(better[:, None], x[g], leader)
    return top, total, moment, second, best, best_group, leader, top_id


@gluon.jit
def _tempered(x, slope, offset, GROUPS: gl.constexpr):
    weights = ()
    for g in gl.static_range(GROUPS):
        weights = weights + (gl.sum(gl.exp2(x[g] * slope[:, None] - offset[:, None]), 1),)
    return weights


@gluon.jit
def _race_scores(weights, races, GROUPS: gl.constexpr):
    scores = ()
    for g in gl.static_range(GROUPS):
        scores = scores + (weights[g] * races[g],)
    return scores


@gluon.jit
def _greedy_scores(x, scores, greedy, GROUPS: gl.constexpr):
    mixed = ()
    for g in gl.static_range(GROUPS):
        mixed = mixed + (gl.where(greedy, gl.max(x[g], 1), scores[g]),)
    return mixed


@gluon.jit
def _shifted(x, shift, GROUPS: gl.constexpr):
    """Add the bias ``[64 * GROUPS]``, in the layout of columns, to all groups."""
    if GROUPS == 2:
        a, b = shift.reshape(2, GROUP_SIZE).permute(1, 0).split()
        shifts = (a, b)
    else:
        left, right = shift.reshape(2, 2 * GROUP_SIZE).permute(1, 0).split()
        a, b = left.reshape(2, GROUP_SIZE).permute(1, 0).split()
        c, d = right.reshape(2, GROUP_SIZE).permute(1, 0).split()
        shifts = (a, b, c, d)
    shifted = ()
    for g in gl.static_range(GROUPS):
        shifted = shifted + (x[g] + gl.convert_layout(shifts[g], COLUMN, True)[None, :],)
    return shifted


@gluon.jit
def _sloped(x, slope, GROUPS: gl.constexpr):
    """The logits divided by the temperatures of their rows, with LOWEST where they are excluded."""
    sloped = ()
    for g in gl.static_range(GROUPS):
        sloped = sloped + (gl.where(x[g] < IMPOSSIBLE, LOWEST, x[g] * slope[:, None]),)
    return sloped


@gluon.jit
def _cut(x, left, column, GROUPS: gl.constexpr):
    """The tile with everything past its first `left` columns excluded."""
    cut = ()
    for g in gl.static_range(GROUPS):
        cut = cut + (gl.where((column < left - g * GROUP_SIZE)[None, :], x[g], LOWEST),)
    return cut
