"""`vocab_projection` in Triton: one pass over the output layer, no logit ever written but the winners'.

Kernel 1 multiplies tiles and folds each into a few numbers per row: maximum, sum of exponentials, their first moment,
second maximum, and the best *group* of 64 ids with its 64 logits. A group's score is its logsumexp plus one Gumbel draw
(its maximum for greedy rows), kept as an exponential race ``sum / exponential`` so that it costs no logarithm. Kernel 2
combines the vocabulary splits of each row and picks the token among the winning group's 64 logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mdkern.kernels import triton_noise as noise

GROUP_SIZE = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)  # stands for -inf, and is finite: neither differences with it nor 0 * it are NaN
GREEDY = tl.constexpr(0)
SAMPLED = tl.constexpr(1)  # temperature 1 on every row
MIXED = tl.constexpr(2)  # a temperature per row, 0 among them
STATISTICS = tl.constexpr(6)  # floats per row and slot, besides the 64 logits


@triton.jit
def _schedule(count, columns, BM: tl.constexpr, BN: tl.constexpr, PROGRAMS: tl.constexpr):
    """Who computes what, from the number of rows on the device.

    Whole waves of row tiles take a program each over the whole vocabulary; the rest split the vocabulary between them,
    so that the card is full at any number of rows.
    """
    row_tiles = tl.cdiv(count, BM)
    vocab_tiles = tl.cdiv(columns, BN)
    whole = (row_tiles // PROGRAMS) * PROGRAMS
    rest = row_tiles - whole
    chunk = tl.cdiv(vocab_tiles, tl.minimum(PROGRAMS // tl.maximum(rest, 1), vocab_tiles))
    return whole, rest, chunk, tl.cdiv(vocab_tiles, chunk), vocab_tiles


@triton.jit
def _halves(x):
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _groups(x, GROUPS: tl.constexpr):
    """``[BM, 64 * GROUPS]`` as a tuple of ``[BM, 64]``."""
    if GROUPS == 1:
        return (x,)
    elif GROUPS == 2:
        a, b = _halves(x)
        return (a, b)
    else:
        left, right = _halves(x)
        a, b = _halves(left)
        c, d = _halves(right)
        return (a, b, c, d)


@triton.jit
def _merge_top2(a1, a2, b1, b2):
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@triton.jit
def _absorb(
    x,  # [BM, BN] logits of this tile
    tile,
    state,
    inv_temperature,
    seed,
    sample,
    position,
    step,
    MODE: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
):
    """Fold a tile of logits into the running state of its rows."""
    top, total, moment, second, best, best_group, leader = state
    BM: tl.constexpr = x.shape[0]
    BN: tl.constexpr = x.shape[1]
    GROUPS: tl.constexpr = BN // GROUP_SIZE

    if WANT_TOP and MODE != GREEDY:
        tile_top, tile_second = tl.reduce((x, tl.full([BM, BN], -float("inf"), tl.float32)), 1, _merge_top2)
        second = tl.maximum(tl.maximum(second, tile_second), tl.minimum(top, tile_top))
    else:
        tile_top = tl.max(x, 1)
    old_offset = top * LOG2E
    top = tl.maximum(top, tile_top)
    offset = top * LOG2E
    shift = old_offset - offset
    rescale = tl.exp2(shift)
    d = x * LOG2E - offset[:, None]
    e = tl.exp2(d)
    if WANT_ENTROPY:
        moment = (moment + total * shift) * rescale + tl.sum(e * d, 1)
    total = total * rescale
    if MODE == SAMPLED:
        best = best * rescale
        weights = _groups(e, GROUPS)
    else:
        total += tl.sum(e, 1)
        if MODE == MIXED:
            greedy = inv_temperature == 0.0
            best = tl.where(greedy, best, best * tl.exp2(shift * inv_temperature))
            weights = _groups(tl.exp2(d * inv_temperature[:, None]), GROUPS)
    logits = _groups(x, GROUPS)
    for g in tl.static_range(GROUPS):
        group = tile * GROUPS + g
        if MODE == GREEDY:
            score = tl.max(logits[g], 1)
            if WANT_TOP:
                second = tl.maximum(second, tl.minimum(best, score))
        else:
            weight = tl.sum(weights[g], 1)
            if MODE == SAMPLED:
                total += weight
            if g % 2 == 0:
                w0, w1, w2, w3 = noise.random_words(seed, sample, position, step, group >> 1, noise.GROUP)
            if GROUPS == 1:
                odd = (tile & 1) == 1
                high, low = tl.where(odd, w2, w0), tl.where(odd, w3, w1)
            elif g % 2 == 0:
                high, low = w0, w1
            else:
                high, low = w2, w3
            numerator, denominator = noise.race(high, low)
            score = weight * numerator / denominator
            if MODE == MIXED:
                score = tl.where(greedy, tl.max(logits[g], 1), score)
        better = score > best
        best = tl.where(better, score, best)
        best_group = tl.where(better, group, best_group)
        leader = tl.where(better[:, None], logits[g], leader)
    return top, total, moment, second, best, best_group, leader


@triton.jit
def _project(
    hidden,  # [N, D], or a descriptor of the M gathered rows
    weight,  # [V, D], or a descriptor of it
    bias,  # [V] or None
    row_index,
    row_count,  # [] or None
    temperature,  # [M] or None
    seed,
    keys,  # [M, 3]
    statistics,  # [slots, STATISTICS, BM]
    leaders,  # [slots, BM, 64]
    capacity,
    columns,
    depth,
    hidden_stride,
    weight_stride,
    scale,
    soft_cap,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MODE: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    SWAP: tl.constexpr,  # multiply [BN, BK] by [BK, BM]: tensor cores want 64 of the left operand, few rows have none
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    count = capacity
    if row_count is not None:
        count = tl.minimum(tl.load(row_count).to(tl.int32), capacity)
    whole, rest, chunk, splits, vocab_tiles = _schedule(count, columns, BM, BN, PROGRAMS)
    items = whole // PROGRAMS + (program < rest * splits).to(tl.int32)
    seed_value = tl.load(seed)
    depth_tiles = tl.cdiv(depth, BK)
    lane = tl.arange(0, BN)
    for item in range(items):
        row_tile = item * PROGRAMS + program
        slot = row_tile
        first, last = 0, vocab_tiles
        if row_tile >= whole:
            row_tile = whole + program % rest
            first = (program // rest) * chunk
            last = tl.minimum(first + chunk, vocab_tiles)
            slot = whole + (program % rest) * splits + program // rest

        rows = row_tile * BM + tl.arange(0, BM)
        valid = rows < count
        sample = tl.load(keys + rows.to(tl.int64) * 3, mask=valid, other=0).to(tl.uint32)
        position = tl.load(keys + rows.to(tl.int64) * 3 + 1, mask=valid, other=0).to(tl.uint32)
        step = tl.load(keys + rows.to(tl.int64) * 3 + 2, mask=valid, other=0).to(tl.uint32)
        inv_temperature = tl.full([BM], 1.0, tl.float32)
        if MODE == MIXED:
            value = tl.load(temperature + rows, mask=valid, other=1.0)
            inv_temperature = tl.where(value == 0.0, 0.0, 1.0 / value)
        if not HIDDEN_TMA:
            index = tl.load(row_index + rows, mask=valid, other=0).to(tl.int64)
            hidden_rows = hidden + index[:, None] * hidden_stride

        top = tl.full([BM], LOWEST, tl.float32)
        nothing = tl.zeros([BM], tl.float32)
        best = nothing
        if MODE == GREEDY:
            best = tl.full([BM], -float("inf"), tl.float32)
        elif MODE == MIXED:
            best = tl.where(inv_temperature == 0.0, -float("inf"), nothing)
        leader = tl.full([BM, GROUP_SIZE], -float("inf"), tl.float32)
        second = tl.full([BM], -float("inf"), tl.float32)
        state = top, nothing, nothing, second, best, tl.zeros([BM], tl.int32), leader

        for tile in tl.range(first, last, flatten=FLATTEN):
            ids = tile * BN + lane
            if FROM_LOGITS:
                x = tl.load(hidden_rows + ids[None, :], mask=ids[None, :] < columns, other=LOWEST).to(tl.float32)
                x = tl.maximum(x, LOWEST)
            else:
                if SWAP:
                    product = tl.zeros([BN, BM], tl.float32)
                else:
                    product = tl.zeros([BM, BN], tl.float32)
                for k in range(0, depth_tiles):
                    inner = k * BK + tl.arange(0, BK)
                    if HIDDEN_TMA:
                        h = hidden.load([row_tile * BM, k * BK])
                    elif EVEN_K:
                        h = tl.load(hidden_rows + inner[None, :])
                    else:
                        h = tl.load(hidden_rows + inner[None, :], mask=inner[None, :] < depth, other=0.0)
                    if WEIGHT_TMA:
                        w = weight.load([tile * BN, k * BK])
                    else:
                        inside = ids[:, None] < columns
                        if not EVEN_K:
                            inside = inside & (inner[None, :] < depth)
                        w = tl.load(
                            weight + ids.to(tl.int64)[:, None] * weight_stride + inner[None, :], mask=inside, other=0.0
                        )
                    if SWAP:
                        product = tl.dot(w, h.T, product, input_precision=PRECISION)
                    else:
                        product = tl.dot(h, w.T, product, input_precision=PRECISION)
                if SWAP:
                    x = product.T
                else:
                    x = product
            if HAS_SCALE:
                x = x * scale
            if HAS_CAP:
                x = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / soft_cap))))
            if bias is not None:
                x += tl.maximum(tl.load(bias + ids, mask=ids < columns, other=LOWEST), LOWEST)[None, :]
            elif not FROM_LOGITS:
                if (tile + 1) * BN > columns:
                    x = tl.where(ids[None, :] < columns, x, LOWEST)
            state = _absorb(
                x,
                tile,
                state,
                inv_temperature,
                seed_value,
                sample,
                position,
                step,
                MODE,
                WANT_TOP,
                WANT_ENTROPY,
            )

        top, total, moment, second, best, best_group, leader = state
        out = statistics + slot.to(tl.int64) * (STATISTICS * BM) + tl.arange(0, BM)
        tl.store(out, top)
        tl.store(out + BM, total)
        tl.store(out + 2 * BM, moment)
        tl.store(out + 3 * BM, second)
        tl.store(out + 4 * BM, best)
        tl.store(out + 5 * BM, best_group.to(tl.float32, bitcast=True))
        within = tl.arange(0, BM)[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
        tl.store(leaders + slot.to(tl.int64) * (BM * GROUP_SIZE) + within, leader)


@triton.jit
def _finish(
    statistics,
    leaders,
    row_count,
    temperature,
    seed,
    keys,
    token,
    log_prob,
    logsumexp,
    top1,
    top2,
    entropy,
    capacity,
    columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    MODE: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    PDL: tl.constexpr,
):
    count = capacity
    if row_count is not None:
        count = tl.minimum(tl.load(row_count).to(tl.int32), capacity)
    whole, _, _, splits, _ = _schedule(count, columns, BM, BN, PROGRAMS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < count
    wide = rows.to(tl.int64)
    sample = tl.load(keys + wide * 3, mask=valid, other=0).to(tl.uint32)
    position = tl.load(keys + wide * 3 + 1, mask=valid, other=0).to(tl.uint32)
    step = tl.load(keys + wide * 3 + 2, mask=valid, other=0).to(tl.uint32)
    inv_temperature = tl.full([ROWS], 1.0, tl.float32)
    if MODE == MIXED:
        value = tl.load(temperature + rows, mask=valid, other=1.0)
        inv_temperature = tl.where(value == 0.0, 0.0, 1.0 / value)
    seed_value = tl.load(seed)
    if PDL:
        tl.extra.cuda.gdc_wait()

    row_tile = rows // BM
    split_count = tl.where(row_tile < whole, 1, splits)
    first_slot = tl.where(row_tile < whole, row_tile, whole + (row_tile - whole) * splits).to(tl.int64)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    second = tl.full([ROWS], -float("inf"), tl.float32)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    best_group = tl.full([ROWS], 2147483647, tl.int32)
    best_slot = first_slot
    # A while of one turn where SPLITS covers every split, which is what the launcher asks for at few rows.
    for start in range(0, tl.max(tl.where(valid, split_count, 0)), SPLITS):
        split = start + tl.arange(0, SPLITS)
        inside = valid[:, None] & (split[None, :] < split_count[:, None])
        slot = first_slot[:, None] + split[None, :]
        at = statistics + slot * (STATISTICS * BM) + (rows % BM)[:, None]
        part_top = tl.load(at, mask=inside, other=LOWEST)
        part_total = tl.load(at + BM, mask=inside, other=0.0)
        part_best = tl.load(at + 4 * BM, mask=inside, other=-float("inf"))
        part_group = tl.load(at + 5 * BM, mask=inside, other=0.0).to(tl.int32, bitcast=True)

        old_offset = top * LOG2E
        old_top = top
        peak = tl.max(part_top, 1)
        top = tl.maximum(top, peak)
        offset = top * LOG2E
        shift = old_offset - offset
        part_shift = part_top * LOG2E - offset[:, None]
        rescale = tl.exp2(shift)
        part_rescale = tl.exp2(part_shift)
        if WANT_ENTROPY:
            part_moment = tl.load(at + 2 * BM, mask=inside, other=0.0)
            moment = (moment + total * shift) * rescale
            moment += tl.sum((part_moment + part_total * part_shift) * part_rescale, 1)
        total = total * rescale + tl.sum(part_total * part_rescale, 1)
        if WANT_TOP:
            part_second = tl.load(at + 3 * BM, mask=inside, other=-float("inf"))
            # The largest of the parts' other maxima: the peak's own place is taken out once.
            place = tl.min(tl.where(part_top == peak[:, None], split[None, :], 2147483647), 1)
            others = tl.max(tl.where(split[None, :] == place[:, None], LOWEST, part_top), 1)
            second = tl.maximum(second, tl.maximum(tl.max(part_second, 1), others))
            second = tl.maximum(second, tl.minimum(old_top, peak))
        if MODE == SAMPLED:
            best = tl.where(best == -float("inf"), best, best * rescale)
            part_best = tl.where(inside, part_best * part_rescale, -float("inf"))
        elif MODE == MIXED:
            greedy = inv_temperature == 0.0
            best = tl.where(greedy | (best == -float("inf")), best, best * tl.exp2(shift * inv_temperature))
            raced = part_best * tl.exp2(part_shift * inv_temperature[:, None])
            part_best = tl.where(inside, tl.where(greedy[:, None], part_best, raced), -float("inf"))
        peak_best = tl.max(part_best, 1)
        peak_group = tl.min(tl.where(part_best == peak_best[:, None], part_group, 2147483647), 1)
        chosen = (part_best == peak_best[:, None]) & (part_group == peak_group[:, None])
        peak_slot = tl.max(tl.where(chosen, slot, 0), 1)
        better = peak_best > best
        best = tl.where(better, peak_best, best)
        best_group = tl.where(better, peak_group, best_group)
        best_slot = tl.where(better, peak_slot, best_slot)

    lane = tl.arange(0, GROUP_SIZE)
    at = leaders + (best_slot * BM + rows % BM)[:, None] * GROUP_SIZE + lane[None, :]
    leader = tl.load(at, mask=valid[:, None], other=0.0)
    ids = best_group[:, None] * GROUP_SIZE + lane[None, :]
    value = leader
    if MODE != GREEDY:
        pair = (best_group * (GROUP_SIZE // 2))[:, None] + tl.arange(0, GROUP_SIZE // 2)[None, :]
        w0, w1, w2, w3 = noise.random_words(
            seed_value, sample[:, None], position[:, None], step[:, None], pair, noise.TOKEN
        )
        token_noise = tl.join(noise.gumbel(w0, w1), noise.gumbel(w2, w3)).reshape(ROWS, GROUP_SIZE)
        if MODE == SAMPLED:
            value = leader + token_noise
        else:
            sampled = leader * inv_temperature[:, None] + token_noise
            value = tl.where((inv_temperature == 0.0)[:, None], leader, sampled)
    winner = tl.min(tl.where(value == tl.max(value, 1)[:, None], ids, 2147483647), 1)
    winner_logit = tl.max(tl.where(ids == winner[:, None], leader, -float("inf")), 1)
    if WANT_TOP and MODE == GREEDY:  # the leading group holds the maximum, and perhaps the second as well
        second = tl.maximum(second, tl.max(tl.where(ids == winner[:, None], -float("inf"), leader), 1))

    offset = top * LOG2E
    log2_total = tl.log2(total)
    sum_log = (offset + log2_total) * LN2
    nan = float("nan")
    good = valid & (top > LOWEST / 2) & (tl.abs(sum_log) < float("inf"))
    inside = rows < capacity
    tl.store(token + rows, tl.where(good, winner, -1).to(tl.int64), mask=inside)
    tl.store(log_prob + rows, tl.where(good, (winner_logit * LOG2E - offset - log2_total) * LN2, nan), mask=inside)
    tl.store(logsumexp + rows, tl.where(good, sum_log, nan), mask=inside)
    if WANT_TOP:
        tl.store(top1 + rows, tl.where(good, tl.exp2(top * LOG2E - offset) / total, nan), mask=inside)
        tl.store(top2 + rows, tl.where(good, tl.exp2(second * LOG2E - offset) / total, nan), mask=inside)
    if WANT_ENTROPY:
        tl.store(entropy + rows, tl.where(good, (log2_total - moment / total) * LN2, nan), mask=inside)
