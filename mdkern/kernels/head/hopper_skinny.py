"""`vocab_projection` for at most 16 rows ("skinny") on Hopper, in Gluon: hardly slower than reading the weights once.

The tensor cores multiply a group, which is 64 ids of the vocabulary, by 8 or 16 rows. So little of their width is
wasted, and a program's work comes in small pieces. One producer warp copies the output layer through a ring, four
producer warps draw the noise of the next groups, and four consumer warps multiply and fold. The rows stay in shared
memory. Each program writes a record of 32 bytes for each row, with its candidate for the token, and
`hopper_skinny_reduce` merges these. A weight in float8 arrives in half of the time, so that two times four consumer
warps take groups in turn.
Times, and what was tried: docs/notes/output-layer.md.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mdkern.kernels.gluon_common import barrier, ring_advance
from mdkern.kernels.head.hopper_float8 import product_of_float8, reorder_rows
from mdkern.kernels.head.hopper_skinny_noise import NOISE_STAGES, in_whole, produce_noise
from mdkern.kernels.head.hopper_skinny_reduce import RECORD
from mdkern.kernels.head.triton_projection import MIXED
from mdkern.kernels.triton_common import (
    GROUP_SIZE,
    IMPOSSIBLE,
    LOG2E,
    LOWEST,
    NOWHERE,
    load_row_count,
    load_row_index,
    merge_top_two,
)


@constexpr_function
def _tile(rows):
    """The layout of a group's logits, [64, rows], in a tensor-core result."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, rows, 16])


@gluon.jit
def _produce(
    weight, rings, program, groups, CONSUMERS: gl.constexpr, PROGRAMS: gl.constexpr, HEAD_START: gl.constexpr
):  # fmt: skip
    """The producer warp: fill the ring, and after `HEAD_START` copies let the consumers load their first operands.

    Full rings in all programs are 17 MB of copies in flight, and any other load waits behind them. Of a stage each
    consumer has its own tile, and no other ever reads there: the phases of a barrier tell apart only what follows each
    other.
    """
    hidden_tiles, weight_ring, full, empty, asked, _ = rings
    BK: gl.constexpr = weight_ring.shape[2]
    stage = program * 0
    phase = stage + 1
    for first in range(program, groups, CONSUMERS * PROGRAMS):
        for k in range(hidden_tiles.shape[0]):
            mbarrier.wait(asked, 0, pred=k >= HEAD_START)
            for turn in gl.static_range(CONSUMERS):
                group = first + turn * PROGRAMS
                slot = stage * CONSUMERS + turn
                if group < groups:
                    mbarrier.wait(empty.index(slot), phase)
                    ready = full.index(slot)
                    mbarrier.expect(ready, GROUP_SIZE * BK * weight_ring.dtype.primitive_bitwidth // 8)
                    at = [group * GROUP_SIZE, k * BK]
                    tma.async_copy_global_to_shared(weight, at, ready, weight_ring.index(slot))
            stage, phase = ring_advance(stage, phase, weight_ring.shape[0] // CONSUMERS)


@gluon.jit
def _ask_for_rows(hidden, row_index, count, hidden_rows, hidden_dim, hidden_stride, hidden_tiles):
    """Start copying the rows to shared memory, with zeros after them."""
    ROWS: gl.constexpr = hidden_tiles.shape[1]
    BK: gl.constexpr = hidden_tiles.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BK, BK // 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    index, _ = load_row_index(row_index, row, row < count, hidden_rows)
    inner = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    source = hidden + index[:, None] * hidden_stride + inner[None, :]
    for k in range(hidden_tiles.shape[0]):
        inside = (row < count)[:, None] & (inner < hidden_dim - k * BK)[None, :]
        async_copy.async_copy_global_to_shared(hidden_tiles.index(k), source + k * BK, inside)
    async_copy.commit_group()


@gluon.jit
def _product(rings, stage, phase):
    """The product of the next group with all rows, [64, ROWS], and the next stage of the ring."""
    hidden_tiles, weight_ring, full, empty = rings[:4]
    ROWS: gl.constexpr = hidden_tiles.shape[1]
    x = gl.zeros([GROUP_SIZE, ROWS], gl.float32, layout=_tile(ROWS))
    previous = stage + 0  # a copy, as the compiler would take `stage` itself for a constant of the loop
    for k in range(hidden_tiles.shape[0]):
        mbarrier.wait(full.index(stage), phase)
        h = hidden_tiles.index(k).permute((1, 0))
        x = warpgroup_mma(weight_ring.index(stage), h, x, use_acc=k > 0, is_async=True)
        x = warpgroup_mma_wait(1, deps=(x,))
        mbarrier.arrive(empty.index(previous), pred=k > 0)
        previous = stage
        stage, phase = ring_advance(stage, phase, weight_ring.shape[0])
    x = warpgroup_mma_wait(0, deps=(x,))
    mbarrier.arrive(empty.index(previous))
    return x, stage, phase


@gluon.jit
def _add(a, b, c, a_, b_, c_):
    return a + a_, b + b_, c + c_


@gluon.jit
def _absorb(x, ids, group, state, inv_temperature, race, token_noise, MODE: gl.constexpr, WANT_ARGMAX: gl.constexpr):
    """Fold a group's logits, [64, ROWS], into the state of the rows."""
    top, total, moment, second, best, best_group, leader, leader_value, top_id = state
    group_top, group_second = gl.reduce((x, gl.full_like(x, -float("inf"))), 0, merge_top_two)
    second = gl.maximum(gl.maximum(second, group_second), gl.minimum(top, group_top))
    if WANT_ARGMAX:
        group_id = gl.min(gl.where(x == group_top[None, :], gl.expand_dims(ids, 1), NOWHERE), 0)
        top_id = gl.where(group_top > top, group_id, top_id)
    old_top = top
    top = gl.maximum(top, group_top)
    offset = top * LOG2E
    shift = (old_top - top) * LOG2E  # as in `triton_projection._absorb`
    rescale = gl.exp2(shift)
    d = x * LOG2E - offset[None, :]
    e = gl.exp2(d)
    score = group_top
    weight = e
    value = x
    if MODE == MIXED:
        greedy = inv_temperature == 0.0
        weight = gl.exp2(d * inv_temperature[None, :])
        value = gl.where(greedy[None, :], x, x * inv_temperature[None, :] + token_noise)
    group_total, group_moment, group_weight = gl.reduce((e, e * d, weight), 0, _add)
    moment = (moment + total * shift) * rescale + group_moment
    total = total * rescale + group_total
    if MODE == MIXED:
        best = gl.where(greedy, best, best * gl.exp2(shift * inv_temperature))
        score = gl.where(greedy, group_top, group_weight * race)
    better = score > best
    best = gl.where(better, score, best)
    best_group = gl.where(better, group, best_group)
    leader = gl.where(better[None, :], x, leader)
    leader_value = gl.where(better[None, :], value, leader_value)
    return top, total, moment, second, best, best_group, leader, leader_value, top_id


@gluon.jit
def _lead(value, token, logit, value_, token_, logit_):
    """The largest value, the lowest id that has it, and the logit of that id."""
    other = (value_ > value) | ((value_ == value) & (token_ < token))
    return gl.where(other, value_, value), gl.where(other, token_, token), gl.where(other, logit_, logit)


@gluon.jit
def _consume(
    tensors,
    sizes,
    rings,
    draws,
    program,
    groups,
    TURN: gl.constexpr,  # number of the consumer
    CONSUMERS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    MODE: gl.constexpr,
    WANT_ARGMAX: gl.constexpr,
    OF_SAMPLER: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_CAP: gl.constexpr,
):
    """The consumer warps: multiply this program's groups by all rows, then write a record for each row.

    Several consumers take groups in turn, as each were programs of their own. The first one copies the rows.
    """
    NEXT: gl.constexpr = CONSUMERS * PROGRAMS
    hidden, weight_scale, bias, row_index, row_count, temperature, uniform_temperature, records = tensors
    capacity, vocab, hidden_rows, hidden_dim, hidden_stride, scale, soft_cap, first_id = sizes
    races, noises, drawn, used = draws
    ROWS: gl.constexpr = races.shape[1]
    tile: gl.constexpr = _tile(ROWS)
    by_row: gl.constexpr = gl.SliceLayout(0, tile)
    row = gl.arange(0, ROWS, layout=by_row)
    id_in_group = gl.arange(0, GROUP_SIZE, layout=gl.SliceLayout(1, tile))
    count = load_row_count(row_count, capacity)
    value = gl.full([ROWS], 1.0, gl.float32, layout=by_row) * uniform_temperature
    if temperature is not None:
        value = gl.load(temperature + row, mask=row < count, other=1.0)
    first = program + TURN * PROGRAMS
    ids = first * GROUP_SIZE + id_in_group
    if weight_scale is not None:
        next_factor = gl.load(weight_scale + ids, mask=ids < vocab, other=0.0)
    if bias is not None:
        next_shift = gl.load(bias + ids, mask=ids < vocab, other=LOWEST)
    _, total = load_row_index(row_index, row, row < count, hidden_rows)
    if TURN == 0:
        _ask_for_rows(hidden, row_index, count, hidden_rows, hidden_dim, hidden_stride, rings[0])
    mbarrier.arrive(rings[4])
    inv_temperature = gl.where(value == 0.0, 0.0, 1.0 / value)
    if OF_SAMPLER:  # the logits themselves are divided by the temperature
        slope = gl.where(value == 0.0, 1.0, 1.0 / value)
        inv_temperature = gl.where(value == 0.0, 0.0, 1.0)
    nothing = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
    lowest = gl.full([ROWS], -float("inf"), gl.float32, layout=by_row)
    best = gl.where(inv_temperature == 0.0, lowest, nothing)
    top = gl.full([ROWS], LOWEST, gl.float32, layout=by_row)
    leader = gl.full([GROUP_SIZE, ROWS], -float("inf"), gl.float32, layout=tile)
    state = top, total, nothing, lowest, best, row * 0, leader, leader, row * 0
    if TURN == 0:
        async_copy.wait_group(0)
        if weight_scale is not None:
            barrier()
            reorder_rows(rings[0])
        fence_async_shared()
        barrier()
        if CONSUMERS > 1:
            mbarrier.arrive(rings[5])
    else:
        mbarrier.wait(rings[5], 0)

    stage = program * 0
    phase = program * 0
    noise_stage = program * 0 + TURN
    noise_phase = program * 0
    for group in range(first, groups, NEXT):
        ids = group * GROUP_SIZE + id_in_group
        next_ids = ids + NEXT * GROUP_SIZE
        if bias is not None:  # loaded one group ahead, as a load behind full rings takes as long as a group
            shift = next_shift
            next_shift = gl.load(bias + next_ids, mask=next_ids < vocab, other=LOWEST)
        if weight_scale is not None:
            factor = next_factor
            next_factor = gl.load(weight_scale + next_ids, mask=next_ids < vocab, other=0.0)
            x, stage, phase = product_of_float8(rings, stage, phase, tile, TURN, CONSUMERS)
            x = x * gl.expand_dims(factor, 1)
        else:
            x, stage, phase = _product(rings, stage, phase)
        if HAS_SCALE:
            x = x * scale
        if HAS_CAP:
            x = soft_cap * (1.0 - 2.0 / (1.0 + gl.exp2(x * (2.0 * LOG2E / soft_cap))))
        if bias is not None:
            x += gl.expand_dims(gl.where(shift < LOWEST, LOWEST, shift), 1)
        else:
            x = gl.where(gl.expand_dims(ids < vocab, 1), x, LOWEST)
        if OF_SAMPLER and MODE == MIXED:
            x = gl.where(x < IMPOSSIBLE, LOWEST, x * slope[None, :])
        race = nothing
        token_noise = x
        if MODE == MIXED:
            mbarrier.wait(drawn.index(noise_stage), noise_phase)
            race = races.index(noise_stage).load(by_row)
            token_noise = noises.index(noise_stage).load(tile)
            mbarrier.arrive(used.index(noise_stage))
            if CONSUMERS == 1:
                noise_stage, noise_phase = ring_advance(noise_stage, noise_phase, NOISE_STAGES)
            else:  # each has a stage of its own
                gl.static_assert(CONSUMERS == NOISE_STAGES)
                noise_phase ^= 1
        place = in_whole(group, first_id)
        ids = place * GROUP_SIZE + id_in_group
        state = _absorb(x, ids, place, state, inv_temperature, race, token_noise, MODE, WANT_ARGMAX)

    top, total, moment, second, best, best_group, leader, leader_value, top_id = state
    ids = best_group[None, :] * GROUP_SIZE + gl.expand_dims(id_in_group, 1)
    _, token, logit = gl.reduce((leader_value, ids, leader), 0, _lead)
    record = records + (row * NEXT + program * CONSUMERS + TURN) * RECORD
    token_bits, id_bits = token.to(gl.float32, bitcast=True), top_id.to(gl.float32, bitcast=True)
    numbers = (top, total, moment, second, best, token_bits, logit, id_bits)
    for number in gl.static_range(RECORD):
        gl.store(record + number, numbers[number], mask=row < count)


@gluon.jit(do_not_specialize=["capacity", "vocab", "hidden_rows", "first_id"])
def vocab_projection_skinny_kernel(
    hidden,  # [N, D]
    weight,  # descriptor of [V, D]
    weight_scale,  # [V] of a weight in float8, else None
    bias,
    row_index,
    row_count,
    temperature,
    uniform_temperature,
    seed,
    keys,
    records,  # [M, PROGRAMS * CONSUMERS, RECORD]
    capacity,
    vocab,
    hidden_rows,  # N
    hidden_dim,
    hidden_stride,
    scale,
    soft_cap,
    first_id,  # of the rows of `weight`, a multiple of 64; None: 0
    K_TILES: gl.constexpr,
    ROWS: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    HEAD_START: gl.constexpr,
    CONSUMERS: gl.constexpr,
    PROGRAMS: gl.constexpr,
    MODE: gl.constexpr,
    WANT_ARGMAX: gl.constexpr,
    OF_SAMPLER: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_CAP: gl.constexpr,
):
    SLOTS: gl.constexpr = STAGES * CONSUMERS
    weight_ring = gl.allocate_shared_memory(weight.dtype, [SLOTS, GROUP_SIZE, BK], weight.layout)
    held_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BK], hidden.dtype.element_ty)
    hidden_tiles = gl.allocate_shared_memory(hidden.dtype.element_ty, [K_TILES, ROWS, BK], held_layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(asked, count=CONSUMERS)
    held = asked
    # Only barriers that somebody waits for: the compiler gives the memory of others to the noise, and numbers that are
    # written where a barrier was initialised are undefined.
    if CONSUMERS > 1:
        held = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(held, count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    races = gl.allocate_shared_memory(gl.float32, [NOISE_STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    noises = gl.allocate_shared_memory(gl.float32, [NOISE_STAGES, GROUP_SIZE, ROWS], plain)
    drawn = gl.allocate_shared_memory(gl.int64, [NOISE_STAGES, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [NOISE_STAGES, 1], mbarrier.MBarrierLayout())
    if MODE == MIXED:
        for noise_stage in gl.static_range(NOISE_STAGES):
            mbarrier.init(drawn.index(noise_stage), count=1)
            mbarrier.init(used.index(noise_stage), count=1)
    fence_async_shared()
    gdc_wait()  # the previous kernel may not have ended
    gdc_launch_dependents()  # lets the reduce kernel start, which waits for the results of this one
    program = gl.program_id(0)
    groups = gl.cdiv(vocab, GROUP_SIZE)
    rings = (hidden_tiles, weight_ring, full, empty, asked, held)
    draws = (races, noises, drawn, used)
    rows = (hidden, weight_scale, bias, row_index, row_count, temperature, uniform_temperature, records)
    sizes = (capacity, vocab, hidden_rows, hidden_dim, hidden_stride, scale, soft_cap, first_id)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (
                    rows, sizes, rings, draws, program, groups, 0, CONSUMERS, PROGRAMS, MODE, WANT_ARGMAX, OF_SAMPLER,
                    HAS_SCALE, HAS_CAP,
                )),
                (produce_noise, (keys, row_count, seed, capacity, draws, program, groups, first_id, PROGRAMS, MODE)),
                (_produce, (weight, rings, program, groups, CONSUMERS, PROGRAMS, HEAD_START)),
            ],
            [4, 1],
            [128, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    rows, sizes, rings, draws, program, groups, 0, CONSUMERS, PROGRAMS, MODE, WANT_ARGMAX, OF_SAMPLER,
                    HAS_SCALE, HAS_CAP,
                )),
                (_consume, (
                    rows, sizes, rings, draws, program, groups, 1, CONSUMERS, PROGRAMS, MODE, WANT_ARGMAX, OF_SAMPLER,
                    HAS_SCALE, HAS_CAP,
                )),
                (produce_noise, (keys, row_count, seed, capacity, draws, program, groups, first_id, PROGRAMS, MODE)),
                (_produce, (weight, rings, program, groups, CONSUMERS, PROGRAMS, HEAD_START)),
            ],
            [4, 4, 1],
            [152, 112, 24],
        )  # fmt: skip
