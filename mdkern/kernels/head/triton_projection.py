"""`vocab_projection` in Triton: one pass over the output layer that never writes the logits to memory.

The kernel multiplies tiles and folds each of them into a few numbers for each row: maximum, sum of exponentials, their
first moment, second maximum, and the best *group* of 64 ids with its 64 logits. A group's score is its logsumexp plus
one Gumbel number (for greedy rows, its maximum). It is kept in the form of an exponential race, ``sum / exponential``,
which needs no logarithm. `triton_reduce` combines the parts of the vocabulary and picks the token from the best 64
logits.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005, SIM102

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mdkern.kernels import triton_noise as noise
from mdkern.kernels.triton_common import (
    GROUP_SIZE,
    IMPOSSIBLE,
    LOG2E,
    LOWEST,
    NOWHERE,
    finish_logits,
    halves,
    largest_two,
    load_keys,
    load_row_count,
    load_row_index,
    tile_product,
)

GREEDY = tl.constexpr(0)
MIXED = tl.constexpr(1)  # each row has its temperature, which may be 0
# Floats for each row of a partial result, besides the 64 logits: 7, and 1 that completes a sector of 32 bytes, because
# a sector that is only partly written has to be read first.
STATISTICS = tl.constexpr(8)


@triton.jit
def schedule_tiles(count, vocab, BM: tl.constexpr, BN: tl.constexpr, PROGRAMS: tl.constexpr, FIXED: tl.constexpr):
    """How the work is divided among programs, computed on the device from the number of rows.

    Row tiles that fill whole waves get one program each, for the whole vocabulary. Each remaining row tile is split
    among `splits` programs of `chunk` vocabulary tiles each. The programs that are still left take the end of the
    vocabulary, for several row tiles each; `chunk` is chosen such that they finish with the others, if each row tile
    costs them the time of one more tile.

    With FIXED, every row tile is split as if it were the only one, so that the order of a row's sums does not depend on
    the number of rows. Programs then take the parts in turn.
    """
    row_tiles = tl.cdiv(count, BM)
    vocab_tiles = tl.cdiv(vocab, BN)
    if FIXED:
        whole = count * 0
        rest = row_tiles
        chunk = tl.maximum(tl.cdiv(vocab_tiles, PROGRAMS), 1)
        splits = tl.cdiv(vocab_tiles, chunk)
        parts = splits
    else:
        whole = (row_tiles // PROGRAMS) * PROGRAMS
        rest = row_tiles - whole
        splits = tl.minimum(PROGRAMS // tl.maximum(rest, 1), vocab_tiles)
        left = PROGRAMS - rest * splits
        turns = tl.cdiv(rest, tl.maximum(left, 1))  # number of row tiles of each program that is left
        shared = tl.cdiv((vocab_tiles + 1) * turns, splits * turns + 1)
        chunk = tl.maximum(tl.where(left > 0, shared, tl.cdiv(vocab_tiles, splits)), 1)
        splits = tl.minimum(splits, tl.cdiv(vocab_tiles, chunk))
        parts = splits + (splits * chunk < vocab_tiles).to(tl.int32)
    return whole, rest, chunk, splits, parts, vocab_tiles


@triton.jit
def count_items(program, schedule, PROGRAMS: tl.constexpr, FIXED: tl.constexpr):
    """Number of row tiles, or parts of them, that a program works on."""
    whole, rest, _, splits, parts, _ = schedule
    if FIXED:
        items = tl.cdiv(tl.maximum(rest * parts - program, 0), PROGRAMS)
    else:
        left = PROGRAMS - rest * splits
        turns = tl.cdiv(tl.maximum(PROGRAMS - left + rest - program, 0), tl.maximum(left, 1))
        items = whole // PROGRAMS + tl.where(program < rest * splits, 1, turns * (parts - splits))
    return items


@triton.jit
def locate_item(item, program, schedule, PROGRAMS: tl.constexpr, FIXED: tl.constexpr):
    """An item of a program's work: its row tile, its part of the vocabulary (number `splits` is the end that the others
    leave), and the place of its partial result."""
    whole, rest, _, splits, parts, _ = schedule
    row_tile = item * PROGRAMS + program
    part = program * 0
    partial = row_tile
    if FIXED:  # programs at work at the same time read the same weights
        part = row_tile // rest
        row_tile = row_tile % rest
        partial = row_tile * parts + part
    else:
        if row_tile >= whole:
            row, part = program % rest, program // rest
            if program >= rest * splits:
                turn = item - whole // PROGRAMS
                row, part = program - rest * splits + turn * (PROGRAMS - rest * splits), splits
            row_tile = whole + row
            partial = whole + row * parts + part
    return row_tile, part, partial


@triton.jit
def load_temperatures(temperature, uniform_temperature, rows, valid, ROWS: tl.constexpr):
    value = tl.full([ROWS], 1.0, tl.float32)
    if temperature is not None:
        value = tl.load(temperature + rows, mask=valid, other=1.0)
    else:
        value = value * uniform_temperature
    return value


@triton.jit
def _groups(x, GROUPS: tl.constexpr):
    """Split ``[BM, GROUPS * n]`` into a tuple of ``[BM, n]``, without moving a register."""
    if GROUPS == 1:
        return (x,)
    elif GROUPS == 2:
        a, b = halves(x)
        return (a, b)
    else:
        left, right = halves(x)
        a, b = halves(left)
        c, d = halves(right)
        return (a, b, c, d)


@triton.jit
def _group_sums(x, GROUPS: tl.constexpr):
    sums = ()
    parts = _groups(x, GROUPS)
    for g in tl.static_range(GROUPS):
        sums = sums + (tl.sum(parts[g], 1),)
    return sums


@triton.jit
def _group_races(tile, seed, sample, position, step, GROUPS: tl.constexpr):
    """``1 / exponential`` of each row and group of a tile, ``[BM, GROUPS]``; two at least, as Philox serves two."""
    PAIRS: tl.constexpr = (GROUPS + 1) // 2
    pair = (tl.arange(0, PAIRS) + tile * GROUPS // 2)[None, :]
    w0, w1, w2, w3 = noise.random_words(seed, sample[:, None], position[:, None], step[:, None], pair, noise.GROUP)
    races = tl.join(noise.inverse_exponential(w0, w1), noise.inverse_exponential(w2, w3))
    return races.reshape(sample.shape[0], 2 * PAIRS)


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
    any_greedy,
    all_unit,
    MODE: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_ARGMAX: tl.constexpr,
):
    """Fold a tile of logits into the running state of its rows."""
    top, total, moment, second, best, best_group, leader, top_id = state
    BM: tl.constexpr = x.shape[0]
    BN: tl.constexpr = x.shape[1]
    GROUPS: tl.constexpr = BN // GROUP_SIZE

    logits = _groups(x, GROUPS)
    if MODE == GREEDY:  # the second largest within the leading group is found at the end
        tile_top, tile_second = tl.max(logits[0], 1), tl.full([BM], LOWEST, tl.float32)
        group_tops = (tile_top,)
        for g in tl.static_range(1, GROUPS):
            group_top = tl.max(logits[g], 1)
            tile_second = tl.maximum(tile_second, tl.minimum(tile_top, group_top))
            tile_top = tl.maximum(tile_top, group_top)
            group_tops = group_tops + (group_top,)
    elif WANT_TOP:
        tile_top, tile_second = largest_two(x)
    else:  # in pairs, as with `tl.max(x, 1)` the compiler repeats the noise in every lane of a row
        left, right = halves(x)
        tile_top = tl.max(tl.maximum(left, right), 1)
    if WANT_TOP:
        second = tl.maximum(tl.maximum(second, tile_second), tl.minimum(top, tile_top))

    if WANT_ARGMAX:
        ids = tile * BN + tl.arange(0, BN)
        tile_id = tl.min(tl.where(x == tile_top[:, None], ids[None, :], NOWHERE), 1)
        top_id = tl.where(tile_top > top, tile_id, top_id)
    old_top = top
    top = tl.maximum(top, tile_top)
    offset = top * LOG2E
    # A single product, which is 0 where nothing has changed. A difference of products would be fused and rounded once,
    # so it would not be 0, and over hundreds of tiles the sum would be off by 1e-4.
    shift = (old_top - top) * LOG2E
    rescale = tl.exp2(shift)
    d = x * LOG2E - offset[:, None]
    e = tl.exp2(d)
    if WANT_ENTROPY:
        moment = (moment + total * shift) * rescale + tl.sum(e * d, 1)
    total = total * rescale
    weights = _group_sums(e, GROUPS)
    for g in tl.static_range(GROUPS):
        total += weights[g]

    # These branches are taken for whole tiles, across which few values live. Inside the loops they spill registers.
    if MODE == GREEDY:
        scores = group_tops
    else:
        greedy = inv_temperature == 0.0
        best = tl.where(greedy, best, best * tl.exp2(shift * inv_temperature))
        if not all_unit:
            slope = inv_temperature * LOG2E
            weights = _group_sums(tl.exp2(x * slope[:, None] - (top * slope)[:, None]), GROUPS)
        races = _group_races(tile, seed, sample, position, step, GROUPS)
        scores = _race_scores(weights, races, tile, GROUPS)
        if any_greedy:
            scores = _greedy_scores(logits, scores, greedy, GROUPS)
    for g in tl.static_range(GROUPS):
        better = scores[g] > best
        best = tl.where(better, scores[g], best)
        best_group = tl.where(better, tile * GROUPS + g, best_group)
        leader = tl.where(better[:, None], logits[g], leader)
    return top, total, moment, second, best, best_group, leader, top_id


@triton.jit
def _race_scores(weights, races, tile, GROUPS: tl.constexpr):
    column = tl.arange(0, races.shape[1])[None, :]
    scores = ()
    for g in tl.static_range(GROUPS):
        # The column is picked by a sum, so that the compiler does not recompute the noise in a layout that repeats it.
        own = g if GROUPS > 1 else tile & 1
        scores = scores + (weights[g] * tl.sum(tl.where(column == own, races, 0.0), 1),)
    return scores


@triton.jit
def _greedy_scores(logits, scores, greedy, GROUPS: tl.constexpr):
    mixed = ()
    for g in tl.static_range(GROUPS):
        mixed = mixed + (tl.where(greedy, tl.max(logits[g], 1), scores[g]),)
    return mixed


@triton.jit(do_not_specialize=["capacity", "vocab", "hidden_rows", "first_id"])
def vocab_projection_kernel(
    hidden,  # [N, D], or a descriptor of the M gathered rows
    weight,  # [V, D], or a descriptor of it; uint8: the bits of float8
    weight_scale,  # [V] or None
    bias,  # [V] or None
    row_index,
    row_count,  # [] or None
    temperature,  # [M], or None: `uniform_temperature` everywhere
    uniform_temperature,
    seed,
    keys,  # [M, 3]
    statistics,  # [partials, BM, STATISTICS]
    leaders,  # [partials, BM, 64]
    capacity,
    vocab,
    hidden_rows,  # N
    hidden_dim,
    hidden_stride,
    weight_stride,
    scale,
    soft_cap,
    first_id,  # of the rows of `weight`, a multiple of BN; None: 0
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FIXED: tl.constexpr,
    MODE: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_ARGMAX: tl.constexpr,
    OF_SAMPLER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()  # lets the reduce kernel start, which waits for the results of this one
    program = tl.program_id(0)
    count = load_row_count(row_count, capacity)
    schedule = schedule_tiles(count, vocab, BM, BN, PROGRAMS, FIXED)
    whole, _, chunk, _, _, vocab_tiles = schedule
    seed_value = tl.load(seed)
    for item in range(count_items(program, schedule, PROGRAMS, FIXED)):
        row_tile, part, partial = locate_item(item, program, schedule, PROGRAMS, FIXED)
        first, last = 0, vocab_tiles
        if row_tile >= whole:
            first = part * chunk
            last = tl.minimum(first + chunk, vocab_tiles)

        rows = row_tile * BM + tl.arange(0, BM)
        valid = rows < count
        sample, position, step = load_keys(keys, rows, valid)
        inv_temperature = tl.full([BM], 1.0, tl.float32)
        any_greedy, all_unit = False, True  # in this row tile; branches on them save work that few tiles need
        if MODE == MIXED:
            value = load_temperatures(temperature, uniform_temperature, rows, valid, BM)
            any_greedy = tl.max((value == 0.0).to(tl.int32), 0) == 1
            all_unit = tl.min(((value == 0.0) | (value == 1.0)).to(tl.int32), 0) == 1
            inv_temperature = tl.where(value == 0.0, 0.0, 1.0 / value)
            if OF_SAMPLER:
                slope = tl.where(value == 0.0, 1.0, 1.0 / value)
                inv_temperature = tl.where(value == 0.0, 0.0, 1.0)
                all_unit = True
        top = tl.full([BM], LOWEST, tl.float32)
        nothing = tl.zeros([BM], tl.float32)
        if HIDDEN_TMA:
            index, total = rows, nothing
        else:
            index, total = load_row_index(row_index, rows, valid, hidden_rows)
        best = nothing
        if MODE == GREEDY:
            best = tl.full([BM], -float("inf"), tl.float32)
        elif MODE == MIXED:
            best = tl.where(inv_temperature == 0.0, -float("inf"), nothing)
        leader = tl.full([BM, GROUP_SIZE], -float("inf"), tl.float32)
        second = tl.full([BM], -float("inf"), tl.float32)
        no_id = tl.zeros([BM], tl.int32)
        state = top, total, nothing, second, best, no_id, leader, no_id

        for tile in range(first, last):
            ids = tile * BN + tl.arange(0, BN)
            x = tile_product(
                hidden, weight, index, row_tile, tile, vocab, hidden_dim, hidden_stride, weight_stride, BM, BN, BK,
                EVEN_K, HIDDEN_TMA, WEIGHT_TMA, FROM_LOGITS, PRECISION,
            )  # fmt: skip
            x = finish_logits(x, weight_scale, bias, ids, vocab, scale, soft_cap, HAS_SCALE, HAS_CAP)
            if bias is None and not FROM_LOGITS:
                if (tile + 1) * BN > vocab:
                    x = tl.where(ids[None, :] < vocab, x, LOWEST)
            if OF_SAMPLER and MODE == MIXED:
                x = tl.where(x < IMPOSSIBLE, LOWEST, x * slope[:, None])
            place = tile  # in the whole vocabulary, by which the noise is keyed
            if first_id is not None:
                place = tile + first_id // BN
            state = _absorb(
                x, place, state, inv_temperature, seed_value, sample, position, step, any_greedy, all_unit,
                MODE, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX,
            )  # fmt: skip

        top, total, moment, second, best, best_group, leader, top_id = state
        out = statistics + (partial.to(tl.int64) * BM + tl.arange(0, BM)) * STATISTICS
        tl.store(out, top)
        tl.store(out + 1, total)
        tl.store(out + 2, moment)
        tl.store(out + 3, second)
        tl.store(out + 4, best)
        tl.store(out + 5, best_group.to(tl.float32, bitcast=True))
        tl.store(out + 6, top_id.to(tl.float32, bitcast=True))
        tl.store(out + 7, nothing)
        within = tl.arange(0, BM)[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
        tl.store(leaders + partial.to(tl.int64) * (BM * GROUP_SIZE) + within, leader)
