"""`vocab_projection` with `top_k`, `top_p` and `min_p` in Triton: two kernels for each chunk of rows.

The first writes the chunk's logits, divided by the temperature, and statistics of each tile. The second has a program
for each row, which finds the smallest logit that the filters keep (`triton_filter_search`) and draws from the kept ones
as `reference.sample_token` does. Statistics of the model's distribution come from the first kernel, those of the
sampler's distribution from the second.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from mdkern.kernels import triton_noise as noise
from mdkern.kernels.head.triton_filter_search import PER_LANE, find_threshold, next_float
from mdkern.kernels.triton_common import (
    GROUP_SIZE,
    IMPOSSIBLE,
    LN2,
    LOG2E,
    LOWEST,
    NOWHERE,
    largest_two,
    load_row_count,
    load_row_index,
    tile_logits,
)

STATISTICS = tl.constexpr(4)  # of a row in a tile: maximum, sum of exponentials, their first moment, second maximum


@triton.jit(do_not_specialize=["first_row", "chunk", "capacity", "vocab", "hidden_rows"])
def filtered_logits_kernel(
    hidden,
    weight,
    weight_scale,
    bias,
    row_index,
    row_count,  # [] or None
    temperature,  # [M], or None: `uniform_temperature` everywhere
    uniform_temperature,
    scaled,  # [chunk, width]: logits / temperature (logits where that is 0), LOWEST for -inf and past V
    statistics,  # [chunk, STATISTICS, tiles], of the logits
    first_row,
    chunk,  # number of rows from `first_row` on
    capacity,
    vocab,
    hidden_rows,  # N
    hidden_dim,
    hidden_stride,
    weight_stride,
    width,
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
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    OF_SAMPLER: tl.constexpr,
):
    row_tiles = tl.cdiv(chunk, BM)  # row tiles of a vocabulary tile run side by side and share its weights in the cache
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    local = row_tile * BM + tl.arange(0, BM)
    rows = first_row + local
    count = load_row_count(row_count, capacity)
    if first_row + row_tile * BM >= count:
        return
    valid = (local < chunk) & (rows < count)
    index, poison = load_row_index(row_index, rows, valid, hidden_rows)
    x = tile_logits(
        hidden, weight, weight_scale, bias, index, row_tile, tile, vocab, hidden_dim, hidden_stride, weight_stride,
        scale, soft_cap, BM, BN, BK, EVEN_K, HIDDEN_TMA, WEIGHT_TMA, FROM_LOGITS, HAS_SCALE, HAS_CAP, PRECISION,
    )  # fmt: skip

    if WANT_TOP and not OF_SAMPLER:
        top, second = largest_two(x)
    else:
        top = tl.max(x, 1)
    d = (x - top[:, None]) * LOG2E
    e = tl.exp2(d)
    wide, tiles = local.to(tl.int64), tl.cdiv(vocab, BN)
    at = statistics + wide * (STATISTICS * tiles) + tile
    tl.store(at, top, mask=valid)
    tl.store(at + tiles, tl.sum(e, 1) + poison, mask=valid)
    if WANT_ENTROPY and not OF_SAMPLER:
        tl.store(at + 2 * tiles, tl.sum(e * d, 1), mask=valid)
    if WANT_TOP and not OF_SAMPLER:
        tl.store(at + 3 * tiles, second, mask=valid)

    divisor = tl.zeros([BM], tl.float32) + uniform_temperature
    if temperature is not None:
        divisor = tl.load(temperature + rows, mask=valid, other=1.0)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    if tl.max((divisor != 1.0).to(tl.int32), 0) == 1:  # a division, as in the reference, so that ties are the same
        x = tl.where(x == LOWEST, x, tl.div_rn(x, tl.broadcast_to(divisor[:, None], [BM, BN])))
        x = tl.where(x < IMPOSSIBLE, LOWEST, x)
    ids = tile * BN + tl.arange(0, BN)
    tl.store(scaled + wide[:, None] * width + ids[None, :], x, mask=valid[:, None] & (ids < width)[None, :])


@triton.jit
def _is_kept(x, ids, least, last):
    """Whether the filters keep logits: those above `least`, and those equal to it with ids up to `last`."""
    return (x > least) | ((x == least) & (ids <= last))


@triton.jit
def _weigh(
    row,
    weights,  # [groups], to write to
    width,
    top,
    least,
    kept_equals,  # float32: how many of the logits equal to `least` are kept, the lowest ids first
    greedy,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    OF_SAMPLER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sums of exponentials over each group's kept logits (over the row's maxima if `greedy`).

    Returns:
        The last id that is kept of those equal to `least`. With OF_SAMPLER also, over all kept logits: the sum of
        exponentials, their first moment (base 2) and the second largest logit.
    """
    GROUPS: tl.constexpr = BLOCK // GROUP_SIZE
    in_block = tl.arange(0, GROUPS)
    lane = tl.arange(0, GROUP_SIZE)
    groups = tl.cdiv(width, GROUP_SIZE)
    equals, tops = tl.zeros([GROUPS], tl.int32), tl.zeros([GROUPS], tl.int32)
    totals, moments = tl.zeros([GROUPS], tl.float32), tl.zeros([GROUPS], tl.float32)
    seconds = tl.full([GROUPS], LOWEST, tl.float32)
    for start in range(0, groups, GROUPS):
        offset = (start + in_block)[:, None] * GROUP_SIZE + lane[None, :]
        x = tl.load(row + offset, mask=offset < width, other=LOWEST)
        d = (x - top) * LOG2E
        e = tl.where(x >= least, tl.exp2(d), 0.0)
        equals += tl.sum((x == least).to(tl.int32), 1)
        total = tl.sum(e, 1)
        if OF_SAMPLER:
            totals += total
            total = tl.where(greedy, tl.sum((x == top).to(tl.float32), 1), total)
            if WANT_ENTROPY:
                moments += tl.sum(e * d, 1)
            if WANT_TOP:
                tops += tl.sum((x == top).to(tl.int32), 1)
                seconds = tl.maximum(seconds, tl.max(tl.where((x >= least) & (x < top), x, LOWEST), 1))
        tl.store(weights + start + in_block, total, mask=start + in_block < groups)
    tl.debug_barrier()  # the weights are read by other threads than those that wrote them

    last = tl.full([], NOWHERE, tl.int32)
    left_out = tl.sum(equals, 0).to(tl.float32) - kept_equals
    if left_out > 0.0:  # rare: some logits equal to the last kept one are not kept
        before = tl.zeros([], tl.int32)
        last = tl.full([], -1, tl.int32)
        for start in range(0, groups, GROUPS):
            offset = (start + in_block)[:, None] * GROUP_SIZE + lane[None, :]
            x = tl.load(row + offset, mask=offset < width, other=LOWEST)
            equal = (x == least).to(tl.int32)
            in_group = tl.sum(equal, 1)
            rank = before + (tl.cumsum(in_group, 0) - in_group)[:, None] + tl.cumsum(equal, 1)  # from 1
            kept = (equal == 1) & (rank.to(tl.float32) <= kept_equals)
            last = tl.maximum(last, tl.max(tl.max(tl.where(kept, offset, -1), 1), 0))
            before += tl.sum(in_group, 0)
            shown = (x > least) | kept
            if OF_SAMPLER:
                shown = shown & tl.where(greedy, x == top, x >= least)
            e = tl.where(shown, tl.exp2((x - top) * LOG2E), 0.0)
            tl.store(weights + start + in_block, tl.sum(e, 1), mask=start + in_block < groups)
        tl.debug_barrier()
    total, moment, second = tl.sum(totals, 0), tl.sum(moments, 0), tl.max(seconds, 0)
    if OF_SAMPLER:
        left_out = tl.maximum(left_out, 0.0)
        d = (least - top) * LOG2E
        removed = tl.where(left_out > 0.0, left_out * tl.exp2(d), 0.0)
        total -= removed
        if WANT_ENTROPY:
            moment -= tl.where(left_out > 0.0, removed * d, 0.0)
        if WANT_TOP:
            several = tl.sum(tops, 0).to(tl.float32) - tl.where(least == top, left_out, 0.0) > 1.0
            second = tl.where(several, top, second)
    return last, total, moment, second


@triton.jit
def _draw(row, weights, width, least, last, greedy, seed, sample, position, step, RACERS: tl.constexpr):
    """A draw from the softmax of the kept logits (the lowest id of the maxima if `greedy`), and its logit."""
    lane = tl.arange(0, GROUP_SIZE)
    groups = tl.cdiv(width, GROUP_SIZE)
    best, best_group = tl.full([], -1.0, tl.float32), tl.zeros([], tl.int32)
    for start in range(0, groups, RACERS):
        group = start + tl.arange(0, RACERS)
        weight = tl.load(weights + group, mask=group < groups, other=0.0)
        pair = start // 2 + tl.arange(0, RACERS // 2)
        w0, w1, w2, w3 = noise.random_words(seed, sample, position, step, pair, noise.GROUP)
        race = tl.join(noise.inverse_exponential(w0, w1), noise.inverse_exponential(w2, w3)).reshape(RACERS)
        score = tl.where(greedy, (weight > 0.0).to(tl.float32), weight * race)
        peak = tl.max(score, 0)
        peak_group = tl.min(tl.where(score == peak, group, NOWHERE), 0)
        better = peak > best
        best, best_group = tl.where(better, peak, best), tl.where(better, peak_group, best_group)

    ids = best_group * GROUP_SIZE + lane
    x = tl.load(row + ids, mask=ids < width, other=LOWEST)
    pair = best_group * (GROUP_SIZE // 2) + tl.arange(0, GROUP_SIZE // 2)
    w0, w1, w2, w3 = noise.random_words(seed, sample, position, step, pair, noise.TOKEN)
    token_noise = tl.join(noise.gumbel(w0, w1), noise.gumbel(w2, w3)).reshape(GROUP_SIZE)
    value = tl.where(_is_kept(x, ids, least, last), tl.where(greedy, x, x + token_noise), -float("inf"))
    winner = tl.min(tl.where(value == tl.max(value, 0), ids, NOWHERE), 0)
    return winner, tl.max(tl.where(ids == winner, x, -float("inf")), 0)


@triton.jit
def _least_kept(
    row,
    collected,
    width,
    top,
    top_k,
    top_p,
    log_min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    WITHIN: tl.constexpr,
    MIN_P: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The least logit that the filters keep, and how many logits equal to it they keep (float32, infinity for all)."""
    infinity = tl.full([], float("inf"), tl.float32)
    least, expected, kept_equals = tl.full([], IMPOSSIBLE, tl.float32), infinity, infinity
    left_out = tl.zeros([], tl.float32)
    if TOP_K:
        goal = top_k.to(tl.float32)
        least, expected, above, _ = find_threshold(
            row, collected, width, top, least, expected, goal, left_out, False, ROWS, LANES
        )
        kept_equals = goal - above
        left_out = tl.maximum(expected - goal, 0.0)
    if TOP_P:
        floor, equals_of_floor = least, kept_equals
        left_out = tl.where(left_out > 0.0, left_out * tl.exp2((least - top) * LOG2E), 0.0)
        least, _, above, goal = find_threshold(
            row, collected, width, top, floor, expected, top_p, left_out, True, ROWS, LANES
        )
        kept_equals = (goal - above) / tl.exp2((least - top) * LOG2E)
        if WITHIN:
            kept_equals = tl.floor(kept_equals)
            none = (kept_equals < 1.0) & (least < top)  # none of the equal ones, but all above them
            least, kept_equals = tl.where(none, next_float(least), least), tl.where(none, infinity, kept_equals)
        else:
            kept_equals = tl.ceil(kept_equals)
        kept_equals = tl.maximum(kept_equals, 1.0)
        kept_equals = tl.where(least == floor, tl.minimum(kept_equals, equals_of_floor), kept_equals)
    if MIN_P:
        floor = top + log_min_p
        least, kept_equals = tl.maximum(least, floor), tl.where(floor > least, infinity, kept_equals)
    return least, kept_equals


@triton.jit
def _merge(top, total, moment, second, other_top, other_total, other_moment, other_second):
    peak = tl.maximum(top, other_top)
    shift, other_shift = (top - peak) * LOG2E, (other_top - peak) * LOG2E
    rescale, other_rescale = tl.exp2(shift), tl.exp2(other_shift)
    moment = (moment + total * shift) * rescale + (other_moment + other_total * other_shift) * other_rescale
    second = tl.maximum(tl.minimum(top, other_top), tl.maximum(second, other_second))
    return peak, total * rescale + other_total * other_rescale, moment, second


@triton.jit
def _combine(statistics, tiles, WANT_TOP: tl.constexpr, WANT_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum, sum of exponentials, their first moment (base 2) and second maximum of a row, from its tiles."""
    lowest, nothing = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    top, total, moment, second = lowest, nothing, nothing, lowest
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        inside = tile < tiles
        part_top = tl.load(statistics + tile, mask=inside, other=LOWEST)
        part_total = tl.load(statistics + tiles + tile, mask=inside, other=0.0)
        part_moment, part_second = nothing, lowest
        if WANT_ENTROPY:
            part_moment = tl.load(statistics + 2 * tiles + tile, mask=inside, other=0.0)
        if WANT_TOP:
            part_second = tl.load(statistics + 3 * tiles + tile, mask=inside, other=LOWEST)
        top, total, moment, second = _merge(top, total, moment, second, part_top, part_total, part_moment, part_second)
    return tl.reduce((top, total, moment, second), 0, _merge)


@triton.jit(do_not_specialize=["first_row", "capacity", "tiles", "top_k"])
def filtered_draw_kernel(
    scaled,
    statistics,
    scratch,  # [chunk, PER_LANE * LANES + groups]
    row_count,
    temperature,
    uniform_temperature,
    seed,
    keys,  # [M, 3]
    token,
    log_prob,
    logsumexp,
    top1,
    top2,
    entropy,
    first_row,
    capacity,
    width,
    tiles,
    top_k,
    top_p,
    log_min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    WITHIN: tl.constexpr,
    MIN_P: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    OF_SAMPLER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    RACERS: tl.constexpr,
):
    local = tl.program_id(0).to(tl.int64)
    out = first_row + local
    nan = float("nan")
    winner, logit = tl.full([], -1, tl.int32), tl.full([], nan, tl.float32)
    sum_log, p1, p2, nats = logit, logit, logit, logit
    if out < load_row_count(row_count, capacity):
        at = statistics + local * (STATISTICS * tiles)
        top, total, moment, second = _combine(
            at, tiles, WANT_TOP and not OF_SAMPLER, WANT_ENTROPY and not OF_SAMPLER, LANES
        )
        divisor = tl.zeros([], tl.float32) + uniform_temperature
        if temperature is not None:
            divisor = tl.load(temperature + out)
        log2_total = tl.log2(total)
        sum_log = top + log2_total * LN2
        if (top > IMPOSSIBLE) & (tl.abs(sum_log) < float("inf")):
            row = scaled + local * width
            collected = scratch + local * (PER_LANE * LANES + width // GROUP_SIZE)
            weights = collected + PER_LANE * LANES
            greedy = divisor == 0.0
            divisor = tl.where(greedy, 1.0, divisor)
            tempered_top = tl.where(divisor == 1.0, top, tl.div_rn(top, divisor))
            least, kept_equals = tempered_top, tl.full([], float("inf"), tl.float32)
            if OF_SAMPLER or not greedy:
                least, kept_equals = _least_kept(
                    row, collected, width, tempered_top, top_k, top_p, log_min_p, TOP_K, TOP_P, WITHIN, MIN_P, ROWS,
                    LANES,
                )  # fmt: skip
            last, kept_total, kept_moment, kept_second = _weigh(
                row, weights, width, tempered_top, least, kept_equals, greedy, WANT_TOP, WANT_ENTROPY, OF_SAMPLER,
                ROWS * LANES * 4,
            )  # fmt: skip
            key = keys + out * 3
            sample = tl.load(key).to(tl.uint32)
            position = tl.load(key + 1).to(tl.uint32)
            step = tl.load(key + 2).to(tl.uint32)
            winner, logit = _draw(
                row, weights, width, least, last, greedy, tl.load(seed), sample, position, step, RACERS
            )
            if OF_SAMPLER:
                top, total, moment, second = tempered_top, kept_total, kept_moment, kept_second
                log2_total = tl.log2(total)
                sum_log = top + log2_total * LN2
            else:
                logit = logit * divisor
            logit = logit - sum_log
            p1, p2 = 1.0 / total, tl.exp2((second - top) * LOG2E) / total
            nats = (log2_total - moment / total) * LN2
        else:
            sum_log = nan + 0.0 * top
    tl.store(token + out, winner.to(tl.int64))
    tl.store(log_prob + out, logit)
    tl.store(logsumexp + out, sum_log)
    if WANT_TOP:
        tl.store(top1 + out, p1)
        tl.store(top2 + out, p2)
    if WANT_ENTROPY:
        tl.store(entropy + out, nats)
