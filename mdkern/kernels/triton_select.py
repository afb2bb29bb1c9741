"""`mdkern.kernels.select` in Triton: one program per sequence, no sort.

Each entry has a key of its score's bits above its reversed index, so that no two are equal. All rules ask for the
largest set {key >= t} that has some property (at most k members, a worst member good enough, a sum small enough), and
every subset of the best of such a set has it too; so t is found bit by bit from the top, one reduction each.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels import reference
from mdkern.kernels import triton_noise as noise

TOP_K = tl.constexpr(0)
THRESHOLD = tl.constexpr(1)
FACTOR = tl.constexpr(2)
ENTROPY_BOUND = tl.constexpr(3)
NUMBERS = {"top_k": TOP_K, "threshold": THRESHOLD, "factor": FACTOR, "entropy_bound": ENTROPY_BOUND}


@triton.jit
def _fixed_point(entropy):
    clamped = tl.minimum(tl.maximum(entropy.to(tl.float64), -16384.0), 16384.0) * 4294967296.0
    return tl.floor(clamped + 0.5).to(tl.int64)


@triton.jit(do_not_specialize=["limit"])
def _select(
    scores,
    candidates,
    tokens,
    input_ids,
    masked,
    remaining,
    positions,
    quota,
    seed,
    keys,
    revealed,
    entries,  # R
    length,  # L
    bound,
    limit,  # of ENTROPY_BOUND: `bound` in fixed point
    temperature,
    RULE: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,  # of a key
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < entries
    at = row * entries + index
    token = tl.load(tokens + at, mask=inside, other=-1)
    able = inside & (tl.load(candidates + at, mask=inside, other=0) != 0) & (token >= 0)
    score = tl.load(scores + at, mask=inside, other=0.0)
    worth = score
    if RULE == ENTROPY_BOUND:
        worth = -score
    worth = tl.where(worth == worth, worth, -float("inf"))
    worth = tl.where(worth == 0.0, 0.0, worth)  # one zero
    if RANDOM:
        sample = tl.load(keys + at * 3, mask=inside, other=0).to(tl.uint32)
        position = tl.load(keys + at * 3 + 1, mask=inside, other=0).to(tl.uint32)
        step = tl.load(keys + at * 3 + 2, mask=inside, other=0).to(tl.uint32)
        zero = tl.zeros([BLOCK], tl.int32)
        w0, w1, _, _ = noise.random_words(tl.load(seed), sample, position, step, zero, noise.POSITION)
        worth = worth / temperature + noise.gumbel(w0, w1)

    bits = worth.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    key = tl.where(able, ordered * BLOCK + (BLOCK - 1 - index), -1)
    if RULE == THRESHOLD:
        chosen = able & (score >= bound)
    else:
        if RULE == TOP_K:
            most = tl.load(quota + row).to(tl.int32)
        elif RULE == ENTROPY_BOUND:
            entropy = tl.where(able, _fixed_point(-worth), 0)
        one = tl.full([], 1, tl.int64)
        least = one << BITS
        for bit in range(BITS):
            trial = least - (one << (BITS - 1 - bit))
            among = key >= trial
            if RULE == TOP_K:
                passes = tl.sum(among.to(tl.int32), 0) <= most
            elif RULE == FACTOR:
                count = tl.sum(among.to(tl.int32), 0)
                worst = tl.min(tl.where(among, worth, float("inf")), 0)
                passes = (count == 0) | ((count + 1).to(tl.float32) * (1.0 - worst) < bound)
            else:
                spent = tl.where(among, entropy, 0)
                passes = tl.sum(spent, 0) - tl.max(spent, 0) <= limit
            least = tl.where(passes, trial, least)
        chosen = key >= least
    if RULE != TOP_K:
        best = able & (key == tl.max(key, 0))
        chosen = chosen | (best & (tl.max(chosen.to(tl.int32), 0) == 0))

    tl.store(revealed + at, chosen, mask=inside)
    column = index.to(tl.int64)
    if positions is not None:
        column = tl.load(positions + at, mask=chosen, other=0).to(tl.int64)
    tl.store(input_ids + row * length + column, token, mask=chosen)
    if masked is not None:
        tl.store(masked + row * length + column, tl.zeros([BLOCK], tl.int1), mask=chosen)
    if remaining is not None:
        tl.store(remaining + row, tl.load(remaining + row) - tl.sum(chosen.to(tl.int64), 0))


def select(
    scores: Tensor,
    candidates: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    masked: Tensor | None,
    remaining: Tensor | None,
    positions: Tensor | None,
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
    for name, tensor in (("input_ids", input_ids), ("masked", masked)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is written in place and must be contiguous, not of strides {tensor.stride()}")

    def dense(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    block = max(32, triton.next_power_of_2(entries))
    _select[(rows,)](
        dense(scores),
        dense(candidates),
        dense(tokens),
        input_ids,
        masked,
        remaining,
        dense(positions),
        dense(quota),
        seed,
        dense(keys),
        revealed,
        entries,
        input_ids.shape[1],
        bound,
        int(reference.fixed_point(torch.tensor(bound))) if rule == "entropy_bound" else 0,
        temperature,
        RULE=NUMBERS[rule],
        RANDOM=temperature > 0.0,
        BLOCK=block,
        BITS=32 + block.bit_length() - 1,
        num_warps=min(32, max(1, block // 256)),
    )
    return revealed
