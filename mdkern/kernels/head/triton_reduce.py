"""The second kernel of `vocab_projection`: combines the parts of the vocabulary of each row and picks its token.

Of a shard of the vocabulary it writes a record for each row, and `merge_shards_kernel` combines those of all shards.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mdkern.kernels import triton_noise as noise
from mdkern.kernels.head.triton_projection import GREEDY, MIXED, STATISTICS, load_temperatures, schedule_tiles
from mdkern.kernels.triton_common import (
    GROUP_SIZE,
    LN2,
    LOG2E,
    LOWEST,
    NOWHERE,
    flip_order,
    load_keys,
    load_row_count,
)

# Numbers of a record, see `mdkern.kernels.head.sharded`; eight are a sector of memory.
RECORD = tl.constexpr(8)


@triton.jit
def _largest(x):
    """The largest over the last dimension, found as integers, for which a warp has an instruction."""
    return flip_order(tl.max(flip_order(x.to(tl.int32, bitcast=True)), 1)).to(tl.float32, bitcast=True)


@triton.jit
def _merge(
    statistics,
    start,  # the first of SPLITS splits
    rows,
    valid,
    split_count,
    first_partial,
    inv_temperature,
    state,
    BM,
    SPLITS: tl.constexpr,
    MODE: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_ARGMAX: tl.constexpr,
):
    """Merge some of the rows' splits into their state."""
    top, total, moment, second, best, best_group, best_split, top_id = state
    split = start + tl.arange(0, SPLITS)
    inside = valid[:, None] & (split[None, :] < split_count[:, None])
    partial = first_partial[:, None] + split[None, :]
    at = statistics + (partial * BM + (rows % BM)[:, None]) * STATISTICS
    part_top = tl.load(at, mask=inside, other=LOWEST)
    part_best = tl.load(at + 4, mask=inside, other=-float("inf"))
    part_group = tl.load(at + 5, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    part_total = tl.load(at + 1, mask=inside, other=0.0)
    part_moment = tl.load(at + 2, mask=inside, other=0.0)
    part_second = tl.load(at + 3, mask=inside, other=-float("inf"))

    old_top = top
    peak = _largest(part_top)
    top = tl.maximum(top, peak)
    if WANT_ARGMAX:
        part_id = tl.load(at + 6, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        peak_id = tl.min(tl.where(part_top == peak[:, None], part_id, NOWHERE), 1)
        top_id = tl.where(peak > old_top, peak_id, tl.where(peak == old_top, tl.minimum(top_id, peak_id), top_id))
    offset = top * LOG2E
    shift = (old_top - top) * LOG2E
    part_shift = part_top * LOG2E - offset[:, None]
    if MODE == MIXED:
        greedy = inv_temperature == 0.0
        best = tl.where(greedy | (best == -float("inf")), best, best * tl.exp2(shift * inv_temperature))
        raced = part_best * tl.exp2(part_shift * inv_temperature[:, None])
        part_best = tl.where(inside, tl.where(greedy[:, None], part_best, raced), -float("inf"))
    peak_best = _largest(part_best)
    leads = part_best == peak_best[:, None]
    peak_group = tl.min(tl.where(leads, part_group, NOWHERE), 1)
    peak_split = tl.max(tl.where(leads & (part_group == peak_group[:, None]), split[None, :], 0), 1)
    better = peak_best > best
    best = tl.where(better, peak_best, best)
    best_group = tl.where(better, peak_group, best_group)
    best_split = tl.where(better, peak_split, best_split)

    rescale = tl.exp2(shift)
    part_rescale = tl.exp2(part_shift)
    if WANT_ENTROPY:
        moment = (moment + total * shift) * rescale
        moment += tl.sum((part_moment + part_total * part_shift) * part_rescale, 1)
    total = total * rescale + tl.sum(part_total * part_rescale, 1)
    if WANT_TOP:
        # The largest of the maxima of the other parts, that is, without one occurrence of the maximum.
        place = tl.min(tl.where(part_top == peak[:, None], split[None, :], NOWHERE), 1)
        others = tl.where(split[None, :] == place[:, None], LOWEST, part_top)
        second = tl.maximum(second, _largest(tl.maximum(part_second, others)))
        second = tl.maximum(second, tl.minimum(old_top, peak))
    return top, total, moment, second, best, best_group, best_split, top_id


@triton.jit
def write_outputs(
    rows,
    inside,
    valid,  # which rows exist; the others get -1 and NaN
    winner,
    winner_logit,
    top,
    total,
    moment,
    second,
    top_id,
    token,
    log_prob,
    logsumexp,
    top1,
    top2,
    entropy,
    argmax,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_ARGMAX: tl.constexpr,
):
    """Write the outputs of rows from their merged state."""
    offset = top * LOG2E
    log2_total = tl.log2(total)
    sum_log = (offset + log2_total) * LN2
    nan = float("nan")
    good = valid & (top > LOWEST / 2) & (tl.abs(sum_log) < float("inf"))
    tl.store(token + rows, tl.where(good, winner, -1).to(tl.int64), mask=inside)
    tl.store(log_prob + rows, tl.where(good, (winner_logit * LOG2E - offset - log2_total) * LN2, nan), mask=inside)
    tl.store(logsumexp + rows, tl.where(good, sum_log, nan), mask=inside)
    if WANT_TOP:
        tl.store(top1 + rows, tl.where(good, tl.exp2(top * LOG2E - offset) / total, nan), mask=inside)
        tl.store(top2 + rows, tl.where(good, tl.exp2(second * LOG2E - offset) / total, nan), mask=inside)
    if WANT_ENTROPY:
        tl.store(entropy + rows, tl.where(good, (log2_total - moment / total) * LN2, nan), mask=inside)
    if WANT_ARGMAX:
        tl.store(argmax + rows, tl.where(good, top_id, -1).to(tl.int64), mask=inside)


@triton.jit
def write_record(records, rows, inside, valid, top, total, moment, second, best, winner, winner_logit, top_id):
    """Write a shard's record of rows, as `mdkern.kernels.head.sharded` defines it; undefined past the last row."""
    at = records + rows.to(tl.int64) * RECORD
    write = inside & valid
    tl.store(at, top, mask=write)
    tl.store(at + 1, total, mask=write)
    tl.store(at + 2, moment, mask=write)
    tl.store(at + 3, second, mask=write)
    tl.store(at + 4, best, mask=write)
    tl.store(at + 5, winner.to(tl.float32, bitcast=True), mask=write)
    tl.store(at + 6, top_id.to(tl.float32, bitcast=True), mask=write)
    tl.store(at + 7, winner_logit, mask=write)


@triton.jit(do_not_specialize=["capacity", "vocab"])
def vocab_projection_reduce_kernel(
    statistics,
    leaders,
    row_count,
    temperature,
    uniform_temperature,
    seed,
    keys,
    token,
    log_prob,
    logsumexp,
    top1,
    top2,
    entropy,
    argmax,
    records,  # [M, RECORD], written instead of the outputs unless it is None
    capacity,
    vocab,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FIXED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    MODE: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_ARGMAX: tl.constexpr,
    OF_SAMPLER: tl.constexpr,
    PDL: tl.constexpr,
):
    count = load_row_count(row_count, capacity)
    whole, _, _, _, parts, _ = schedule_tiles(count, vocab, BM, BN, PROGRAMS, FIXED)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < count
    sample, position, step = load_keys(keys, rows, valid)
    inv_temperature = tl.full([ROWS], 1.0, tl.float32)
    if MODE == MIXED:
        value = load_temperatures(temperature, uniform_temperature, rows, valid, ROWS)
        inv_temperature = tl.where(value == 0.0, 0.0, 1.0 if OF_SAMPLER else 1.0 / value)
    seed_value = tl.load(seed)
    if PDL:
        gdc_wait()

    row_tile = rows // BM
    split_count = tl.where(row_tile < whole, 1, parts)
    first_partial = tl.where(row_tile < whole, row_tile, whole + (row_tile - whole) * parts).to(tl.int64)
    nothing, lowest = tl.zeros([ROWS], tl.float32), tl.full([ROWS], -float("inf"), tl.float32)
    no_group = tl.full([ROWS], NOWHERE, tl.int32)
    state = tl.full([ROWS], LOWEST, tl.float32), nothing, nothing, lowest, lowest, no_group, rows * 0, no_group
    if SPLITS >= PROGRAMS:  # all at once: the best group's logits are loaded while the sums are added up
        state = _merge(
            statistics, 0, rows, valid, split_count, first_partial, inv_temperature, state, BM, SPLITS, MODE, WANT_TOP,
            WANT_ENTROPY, WANT_ARGMAX,
        )  # fmt: skip
    else:
        for start in range(0, tl.max(tl.where(valid, split_count, 0)), SPLITS):
            state = _merge(
                statistics, start, rows, valid, split_count, first_partial, inv_temperature, state, BM, SPLITS, MODE,
                WANT_TOP, WANT_ENTROPY, WANT_ARGMAX,
            )  # fmt: skip
    top, total, moment, second, best, best_group, best_split, top_id = state

    lane = tl.arange(0, GROUP_SIZE)
    at = leaders + ((first_partial + best_split) * BM + rows % BM)[:, None] * GROUP_SIZE + lane[None, :]
    leader = tl.load(at, mask=valid[:, None], other=0.0)
    ids = best_group[:, None] * GROUP_SIZE + lane[None, :]
    value = leader
    if MODE != GREEDY:
        pair = (best_group * (GROUP_SIZE // 2))[:, None] + tl.arange(0, GROUP_SIZE // 2)[None, :]
        w0, w1, w2, w3 = noise.random_words(
            seed_value, sample[:, None], position[:, None], step[:, None], pair, noise.TOKEN
        )
        token_noise = tl.join(noise.gumbel(w0, w1), noise.gumbel(w2, w3)).reshape(ROWS, GROUP_SIZE)
        sampled = leader * inv_temperature[:, None] + token_noise
        value = tl.where((inv_temperature == 0.0)[:, None], leader, sampled)
    winner = tl.min(tl.where(value == _largest(value)[:, None], ids, NOWHERE), 1)
    winner_logit = _largest(tl.where(ids == winner[:, None], leader, -float("inf")))
    if WANT_TOP and MODE == GREEDY:  # the leading group holds the maximum, and perhaps the second largest as well
        second = tl.maximum(second, tl.max(tl.where(ids == winner[:, None], -float("inf"), leader), 1))

    if records is not None:
        write_record(
            records, rows, rows < capacity, valid, top, total, moment, second, best, winner, winner_logit, top_id
        )
    else:
        write_outputs(
            rows, rows < capacity, valid, winner, winner_logit, top, total, moment, second, top_id, token, log_prob,
            logsumexp, top1, top2, entropy, argmax, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX,
        )  # fmt: skip


@triton.jit(do_not_specialize=["capacity"])
def merge_shards_kernel(
    records,  # [SHARDS, M, RECORD]
    row_count,
    temperature,
    uniform_temperature,
    token,
    log_prob,
    logsumexp,
    top1,
    top2,
    entropy,
    argmax,
    capacity,
    SHARDS: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least SHARDS
    ROWS: tl.constexpr,
    MODE: tl.constexpr,
    WANT_TOP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_ARGMAX: tl.constexpr,
    OF_SAMPLER: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < load_row_count(row_count, capacity)
    inv_temperature = tl.full([ROWS], 1.0, tl.float32)
    if MODE == MIXED:
        value = load_temperatures(temperature, uniform_temperature, rows, valid, ROWS)
        inv_temperature = tl.where(value == 0.0, 0.0, 1.0 if OF_SAMPLER else 1.0 / value)
    nothing, lowest = tl.zeros([ROWS], tl.float32), tl.full([ROWS], -float("inf"), tl.float32)
    nobody = tl.full([ROWS], NOWHERE, tl.int32)
    state = tl.full([ROWS], LOWEST, tl.float32), nothing, nothing, lowest, lowest, nobody, rows * 0, nobody
    shards, first = tl.full([ROWS], SHARDS, tl.int32), tl.zeros([ROWS], tl.int64)
    top, total, moment, second, _, winner, shard, top_id = _merge(
        records, 0, rows, valid, shards, first, inv_temperature, state, capacity, SPLITS, MODE, WANT_TOP, WANT_ENTROPY,
        WANT_ARGMAX,
    )  # fmt: skip
    at = records + (shard.to(tl.int64) * capacity + rows) * RECORD + 7
    winner_logit = tl.load(at, mask=valid, other=0.0)
    write_outputs(
        rows, rows < capacity, valid, winner, winner_logit, top, total, moment, second, top_id, token, log_prob,
        logsumexp, top1, top2, entropy, argmax, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX,
    )  # fmt: skip
