"""`mdkern.kernels.select` in Triton: one program per sequence, without sorting.

Going through the entries from the best down, every rule admits an entry by the number of better ones (or the sum of
their entropies) and by its own score; after the first entry that a rule refuses it admits none. So each rule has a
lowest score that it admits. The kernel finds it by bisection over the ordered bits of the scores, with one reduction in
each round, until one entry or one score is left to decide on. Entries of that score are then counted in order of their
index. The scores are first rounded to the grid of `steps_below_best`.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels import triton_noise as noise
from mdkern.kernels.loop import grid

TOP_K = tl.constexpr(0)
THRESHOLD = tl.constexpr(1)
FACTOR = tl.constexpr(2)
ENTROPY_BOUND = tl.constexpr(3)
NUMBERS = {"top_k": TOP_K, "threshold": THRESHOLD, "factor": FACTOR, "entropy_bound": ENTROPY_BOUND}
MOST_ENTRIES = 65_535  # entries of a sequence: the sum of so many entropies, each below 2^46, is below 2^62
MOST_HELD = 4096  # entries of a sequence that are held in registers; the keys of longer ones go to scratch memory
STEP_BITS = tl.constexpr(grid.STEP_BITS)


@triton.jit
def _fixed_point(entropy):
    clamped = tl.minimum(tl.maximum(entropy.to(tl.float64), -16384.0), 16384.0) * 4294967296.0
    return tl.floor(clamped + 0.5).to(tl.int64)


@triton.jit
def _key(worth):
    """The bits of a float32 that is not NaN as a uint32 of the same order; no number gives 0."""
    bits = worth.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _worth(key):
    """The float32 whose `_key` it is."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _on_grid(key, best_key):
    """The key of a score rounded to the grid, see `grid.steps_below_best`."""
    worth, best = _worth(key), _worth(best_key)
    power = tl.maximum(best.to(tl.int32, bitcast=True) & 0x7F800000, 127 << 23)
    step_bits = power - (STEP_BITS << 23)
    step = step_bits.to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - step_bits).to(tl.float32, bitcast=True)
    anchor = tl.where(tl.abs(best) < 0.5 * step, 0.0, best)
    below = tl.floor((best - worth) * inverse + 0.5) * step
    rounded = tl.where(tl.abs(best) < float("inf"), anchor - below, worth)
    return tl.where(key > 0, _key(rounded), 0)


@triton.jit
def _load_key(
    scores, candidates, tokens, keys, seed, temperature, index, entries, RULE: tl.constexpr, RANDOM: tl.constexpr
):
    """The keys that entries are ordered by, the best highest; 0 for entries that may not be chosen."""
    at = tl.minimum(index, entries - 1)  # faster than a mask, with whose predicates loads wait for each other
    candidate = tl.load(candidates + at)
    token = tl.load(tokens + at)
    worth = tl.load(scores + at)
    if RULE == ENTROPY_BOUND:
        worth = -worth
    worth = tl.where(worth == worth, worth, -float("inf"))
    worth = tl.where(worth == 0.0, 0.0, worth)  # -0 becomes 0
    if RANDOM:
        sample = tl.load(keys + at * 3).to(tl.uint32)
        position = tl.load(keys + at * 3 + 1).to(tl.uint32)
        step = tl.load(keys + at * 3 + 2).to(tl.uint32)
        w0, w1, _, _ = noise.random_words(tl.load(seed), sample, position, step, at * 0, noise.POSITION)
        worth = worth / temperature + noise.gumbel(w0, w1)
    return tl.where((index < entries) & (candidate != 0) & (token >= 0), _key(worth), 0)


@triton.jit
def _admits(count, spent, worth, most, bound, limit, RULE: tl.constexpr):
    """Whether an entry of this worth is chosen if `count` entries are better, whose entropies sum to `spent`."""
    if RULE == TOP_K:
        return count < most
    elif RULE == FACTOR:
        return (count == 0) | ((count + 2).to(tl.float32) * (1.0 - worth) < bound)
    else:
        return (count == 0) | ((limit >= 0) & (spent <= limit))


@triton.jit
def _add(a, b, a_too, b_too):
    return a + a_too, b + b_too


@triton.jit
def _count_from(trial, key, entropy, held, last, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Number of entries whose key is `trial` or more and, for ENTROPY_BOUND, the sum of their entropies."""
    count = tl.zeros([BLOCK], tl.int32)
    spent = tl.zeros([BLOCK], tl.int64)
    for start in range(0, last, BLOCK):
        if held is not None:
            key = tl.load(held + start + tl.arange(0, BLOCK)).to(tl.uint32, bitcast=True)
            if RULE == ENTROPY_BOUND:
                entropy = _fixed_point(-_worth(key))
        count += (key >= trial).to(tl.int32)
        if RULE == ENTROPY_BOUND:
            spent += tl.where(key >= trial, entropy, 0)
    if RULE == ENTROPY_BOUND:
        return tl.reduce((count, spent), 0, _add)
    else:
        return tl.sum(count, 0), tl.full([], 0, tl.int64)


@triton.jit(do_not_specialize=["held", "limit", "entries", "length"])
def select_kernel(
    scores,
    candidates,
    tokens,
    input_ids,
    quota,
    seed,
    keys,
    revealed,
    held,  # scratch for the keys of sequences longer than BLOCK
    entries,  # R
    length,  # L
    bound,
    limit,  # for ENTROPY_BOUND: `bound` in fixed point
    temperature,
    RULE: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += row * entries
    candidates += row * entries
    tokens += row * entries
    revealed += row * entries
    input_ids += row * length
    if keys is not None:
        keys += row * entries * 3
    most = tl.full([], 0, tl.int32)
    if RULE == TOP_K:
        most = tl.minimum(tl.load(quota + row), entries).to(tl.int32)
    last = BLOCK
    if held is not None:
        last = tl.cdiv(entries, BLOCK) * BLOCK
        held += row * last

    key = tl.full([BLOCK], 0, tl.uint32)
    lowest = tl.full([BLOCK], 4294967295, tl.uint32)
    highest = tl.full([BLOCK], 0, tl.uint32)
    for start in range(0, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        key = _load_key(scores, candidates, tokens, keys, seed, temperature, index, entries, RULE, RANDOM)
        if held is not None:
            tl.store(held + index, key.to(tl.int32, bitcast=True))
        highest = tl.maximum(highest, key)
        lowest = tl.minimum(lowest, tl.where(key > 0, key, 4294967295))
    best = tl.max(highest, 0)
    if held is None:
        key = _on_grid(key, best)
    else:
        tl.debug_barrier()
        for start in range(0, last, BLOCK):
            at = held + start + tl.arange(0, BLOCK)
            on_grid = _on_grid(tl.load(at).to(tl.uint32, bitcast=True), best)
            tl.store(at, on_grid.to(tl.int32, bitcast=True))
        tl.debug_barrier()
    high = _on_grid(best, best)
    above = tl.full([], 0, tl.int32)
    spent = tl.full([], 0, tl.int64)
    if RULE == THRESHOLD:
        best_index = tl.full([], 2147483647, tl.int32)
    else:
        # Entries with keys above `high` are chosen; those with keys below `low` are not.
        low = _on_grid(tl.min(lowest, 0), best)
        upto = entries  # at most this many entries have keys of `low` or more; `above` have keys above `high`
        entropy = key
        if RULE == ENTROPY_BOUND:
            entropy = _fixed_point(-_worth(key))
        while (low < high) & (upto - above > 1):
            trial = high - (high - low) // 2
            count, total = _count_from(trial, key, entropy, held, last, RULE, BLOCK)
            lower = _admits(count, total, _worth(trial - 1), most, bound, limit, RULE)
            high = tl.where(lower, trial - 1, high)
            above = tl.where(lower, count, above)
            spent = tl.where(lower, total, spent)
            low = tl.where(lower, low, trial)
            upto = tl.where(lower, upto, count)

    for start in range(0, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        at = tl.minimum(index, entries - 1)
        token = tl.load(tokens + at)
        if held is not None:
            key = tl.load(held + index).to(tl.uint32, bitcast=True)
        if RULE == THRESHOLD:
            first = tl.min(tl.where((key > 0) & (key == high), index, 2147483647), 0)
            best_index = tl.minimum(best_index, first)
            chosen = (key > 0) & ((tl.load(scores + at) >= bound) | (index == best_index))  # the scores: NaN is refused
        else:
            level = (key >= low) & (key <= high)
            place = level.to(tl.int32)
            if upto - above > 1:
                place = tl.cumsum(place, 0)
            place -= 1  # number of equal entries with a lower index
            there = spent
            if RULE == ENTROPY_BOUND:
                entropy = _fixed_point(-_worth(key))
                there = spent + place * entropy
            chosen = (key > high) | (level & _admits(above + place, there, _worth(key), most, bound, limit, RULE))
            if held is not None:
                above += tl.sum(level.to(tl.int32), 0)
                if RULE == ENTROPY_BOUND:
                    spent += tl.sum(tl.where(level, entropy, 0), 0)
        tl.store(revealed + index, chosen, mask=index < entries)
        tl.store(input_ids + index, token, mask=chosen)


def warps(block: int) -> int:
    return min(16, max(1, block // 256))


def select(
    scores: Tensor,
    candidates: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    quota: Tensor | None,
    seed: Tensor | None,
    keys: Tensor | None,
    rule: str,
    bound: float,
    temperature: float,
) -> Tensor:
    """`mdkern.kernels.select` on a GPU (or, on the CPU, in Triton's interpreter)."""
    rows, entries = scores.shape
    revealed = torch.empty((rows, entries), dtype=torch.bool, device=scores.device)
    if rows == 0 or entries == 0:
        return revealed
    if entries > MOST_ENTRIES:
        raise ValueError(f"a sequence has {entries} entries; the kernel counts up to {MOST_ENTRIES}")

    def dense(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    block = min(MOST_HELD, max(32, triton.next_power_of_2(entries)))
    held = None
    if entries > block:
        held = torch.empty((rows, triton.cdiv(entries, block) * block), dtype=torch.int32, device=scores.device)
    select_kernel[(rows,)](
        dense(scores),
        dense(candidates),
        dense(tokens),
        input_ids,
        dense(quota),
        seed,
        dense(keys),
        revealed,
        held,
        entries,
        input_ids.shape[1],
        bound,
        grid.fixed_bound(bound) if rule == "entropy_bound" else 0,
        temperature,
        RULE=NUMBERS[rule],
        RANDOM=temperature > 0.0,
        BLOCK=block,
        num_warps=warps(block),
    )
    return revealed
