"""`vocab_projection_kernel` for Hopper, in Gluon: a producer warp copies, and one or two consumer warpgroups multiply.

The producer fills a ring of tiles and runs ahead past the end of a vocabulary tile, so that copying never waits for
arithmetic. With two consumers, one folds its logits (`hopper_fold`) while the other uses the tensor cores.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, SIM108

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mdkern.kernels.gluon_common import barrier, ring_advance
from mdkern.kernels.head.hopper_float8 import convert_tiles
from mdkern.kernels.head.hopper_fold import (
    COLUMN,
    ROW,
    ROWS,
    TILE,
    _absorb,
    _cut,
    _logit_groups,
    _pairs,
    _races,
    _shifted,
    _sloped,
)
from mdkern.kernels.head.hopper_position import item_position
from mdkern.kernels.head.hopper_produce import produce_tiles
from mdkern.kernels.head.triton_projection import GREEDY, STATISTICS, count_items, schedule_tiles
from mdkern.kernels.triton_common import GROUP_SIZE, LOG2E, LOWEST, load_keys, load_row_count, load_row_index


@gluon.jit
def _consume(
    tensors,
    sizes,
    rings,
    work,
    K_TILES: gl.constexpr,
    HALF: gl.constexpr,  # number of the consumer, which has 64 of the tile's rows
    PROGRAMS: gl.constexpr,
    FIXED: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    STATIONARY: gl.constexpr,
    HEAD_START: gl.constexpr,
    MODE: gl.constexpr,
    WANT_TOP: gl.constexpr,
    WANT_ENTROPY: gl.constexpr,
    WANT_ARGMAX: gl.constexpr,
    OF_SAMPLER: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_CAP: gl.constexpr,
):
    """A consumer warpgroup: multiplies its 64 rows by every tile, and folds each result into the state of the rows."""
    hidden, weight_scale, bias, row_index, temperature, uniform_temperature, seed, keys, statistics, leaders = tensors
    count, vocab, hidden_rows, hidden_dim, hidden_stride, scale, soft_cap, first_id = sizes
    hidden_ring, weight_ring, full, empty, asked = rings[:5]
    program, items, schedule = work
    GROUPS: gl.constexpr = BN // GROUP_SIZE
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    drawn: gl.constexpr = gl.SliceLayout(1, _pairs(GROUPS))
    ids_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    chunk_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, ROWS, layout=ROW)
    column = gl.arange(0, GROUP_SIZE, layout=COLUMN)
    seed_value = gl.load(seed)
    stage = program * 0
    phase = program * 0
    for item in range(items):
        row_tile, first, last, stride, partial = item_position(item, program, schedule, PROGRAMS, FIXED)
        if STATIONARY:  # first of all, as otherwise these loads wait behind the copies of the weights
            gathered = row_tile * BM + gl.arange(0, ROWS, layout=gl.SliceLayout(1, chunk_layout))
            index, _ = load_row_index(row_index, gathered, gathered < count, hidden_rows)
            inner = gl.arange(0, BK, layout=gl.SliceLayout(0, chunk_layout))
            source = hidden + index[:, None] * hidden_stride + inner[None, :]
            for k in range(K_TILES):
                inside = (gathered < count)[:, None] & (inner < hidden_dim - k * BK)[None, :]
                async_copy.async_copy_global_to_shared(hidden_ring.index(k), source + k * BK, inside)
            async_copy.commit_group()
        rows = row_tile * BM + HALF * ROWS + gl.arange(0, ROWS, layout=drawn)
        sample, position, step = load_keys(keys, rows, rows < count)
        rows = row_tile * BM + HALF * ROWS + lane
        inv_temperature = gl.full([ROWS], 1.0, gl.float32, layout=ROW)
        any_greedy = program < 0
        all_unit = program >= 0
        if MODE != GREEDY:
            if temperature is not None:
                value = gl.load(temperature + rows, mask=rows < count, other=1.0)
            else:
                value = gl.full([ROWS], 1.0, gl.float32, layout=ROW) * uniform_temperature
        total = gl.full([ROWS], 0.0, gl.float32, layout=ROW)
        if STATIONARY:
            _, total = load_row_index(row_index, rows, rows < count, hidden_rows)
        if HEAD_START > 0:
            mbarrier.arrive(asked, pred=item == 0)
        if MODE != GREEDY:
            inv_temperature = gl.where(value == 0.0, 0.0, 1.0 / value)
            any_greedy = gl.max((value == 0.0).to(gl.int32), 0) == 1
            all_unit = gl.min(((value == 0.0) | (value == 1.0)).to(gl.int32), 0) == 1
            if OF_SAMPLER:  # the logits themselves are divided by the temperature
                slope = gl.where(value == 0.0, 1.0, 1.0 / value)
                inv_temperature = gl.where(value == 0.0, 0.0, 1.0)
                all_unit = program >= 0
        if STATIONARY:
            async_copy.wait_group(0)
            fence_async_shared()
            barrier()

        top = gl.full([ROWS], LOWEST, gl.float32, layout=ROW)
        nothing = gl.full([ROWS], 0.0, gl.float32, layout=ROW)
        lowest = gl.full([ROWS], -float("inf"), gl.float32, layout=ROW)
        best = nothing
        if MODE == GREEDY:
            best = lowest
        else:
            best = gl.where(inv_temperature == 0.0, lowest, nothing)
        leader = gl.full([ROWS, GROUP_SIZE], -float("inf"), gl.float32, layout=TILE)
        zero = gl.full([ROWS], 0, gl.int32, layout=ROW)
        state = top, total, nothing, lowest, best, zero, leader, zero
        for tile in range(first, last, stride):
            place = tile  # in the whole vocabulary, by which the noise is keyed
            if first_id is not None:
                place = tile + first_id // BN
            ids = tile * BN + gl.arange(0, BN, layout=ids_layout)
            if weight_scale is not None:
                factor = gl.load(weight_scale + ids, mask=ids < vocab, other=0.0)
            if bias is not None:
                shift = gl.load(bias + ids, mask=ids < vocab, other=LOWEST)
                shift = gl.where(shift < LOWEST, LOWEST, shift)
            if MODE == GREEDY:
                races = ()
            else:
                races = _races(place, seed_value, sample, position, step, GROUPS)
            product = gl.zeros([ROWS, BN], gl.float32, layout=wide)
            previous = stage + 0  # a copy, as the compiler would take `stage` itself for a constant of the loop
            for k in range(K_TILES):
                mbarrier.wait(full.index(stage), phase)
                if STATIONARY:
                    h = hidden_ring.index(k)
                else:
                    h = hidden_ring.index(stage).slice(HALF * ROWS, ROWS, dim=0)
                w = weight_ring.index(stage).permute((1, 0))
                product = warpgroup_mma(h, w, product, use_acc=k > 0, is_async=True)
                product = warpgroup_mma_wait(1, deps=(product,))
                mbarrier.arrive(empty.index(previous), pred=k > 0)
                previous = stage
                stage, phase = ring_advance(stage, phase, STAGES)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(previous))
            if weight_scale is not None:
                product = product * gl.convert_layout(factor, gl.SliceLayout(0, wide))[None, :]
            if HAS_SCALE:
                product = product * scale
            if HAS_CAP:
                product = soft_cap * (1.0 - 2.0 / (1.0 + gl.exp2(product * (2.0 * LOG2E / soft_cap))))
            x = _logit_groups(product, GROUPS)
            if bias is not None:
                x = _shifted(x, gl.convert_layout(shift, gl.SliceLayout(0, wide)), GROUPS)
            else:
                if (tile + 1) * BN > vocab:
                    x = _cut(x, vocab - tile * BN, column, GROUPS)
            if OF_SAMPLER and MODE != GREEDY:
                x = _sloped(x, slope, GROUPS)
            state = _absorb(
                x,
                place,
                state,
                inv_temperature,
                races,
                any_greedy,
                all_unit,
                GROUPS,
                MODE,
                WANT_TOP,
                WANT_ENTROPY,
                WANT_ARGMAX,
            )

        top, total, moment, second, best, best_group, leader, top_id = state
        within = HALF * ROWS + lane
        inside = rows < count
        out = statistics + (partial.to(gl.int64) * BM + within) * STATISTICS
        gl.store(out, top)
        gl.store(out + 1, total)
        gl.store(out + 2, moment)
        gl.store(out + 3, second)
        gl.store(out + 4, best)
        gl.store(out + 5, best_group.to(gl.float32, bitcast=True))
        gl.store(out + 6, top_id.to(gl.float32, bitcast=True))
        gl.store(out + 7, nothing)
        at = leaders + partial.to(gl.int64) * (BM * GROUP_SIZE) + within[:, None] * GROUP_SIZE + column[None, :]
        gl.store(at, leader, mask=inside[:, None])


@gluon.jit(do_not_specialize=["capacity", "vocab", "hidden_rows", "first_id"])
def vocab_projection_hopper_kernel(
    hidden,  # [N, D] where STATIONARY, else a descriptor of the M gathered rows
    weight,  # descriptor of [V, D]
    weight_scale,  # [V] of a weight in float8, else None
    bias,
    row_index,
    row_count,
    temperature,
    uniform_temperature,
    seed,
    keys,
    statistics,
    leaders,
    capacity,
    vocab,
    hidden_rows,  # N
    hidden_dim,
    hidden_stride,
    scale,
    soft_cap,
    first_id,  # of the rows of `weight`, a multiple of BN; None: 0
    K_TILES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    STATIONARY: gl.constexpr,
    HEAD_START: gl.constexpr,
    PROGRAMS: gl.constexpr,
    FIXED: gl.constexpr,
    MODE: gl.constexpr,
    WANT_TOP: gl.constexpr,
    WANT_ENTROPY: gl.constexpr,
    WANT_ARGMAX: gl.constexpr,
    OF_SAMPLER: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_CAP: gl.constexpr,
    RAW_STAGES: gl.constexpr,  # of a weight in float8
    REGISTERS: gl.constexpr,
    CONVERTER_REGISTERS: gl.constexpr,
):
    BM: gl.constexpr = ROWS * CONSUMERS
    element: gl.constexpr = hidden.dtype.element_ty if STATIONARY else hidden.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], element)
    weight_ring = gl.allocate_shared_memory(element, [STAGES, BN, BK], layout)
    if STATIONARY:
        hidden_ring = gl.allocate_shared_memory(element, [K_TILES, ROWS, BK], layout)
    else:
        hidden_ring = gl.allocate_shared_memory(element, [STAGES, BM, BK], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(asked, count=CONSUMERS)
    FILLERS: gl.constexpr = 2 if weight_scale is not None and not STATIONARY else 1
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FILLERS)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    rings = (hidden_ring, weight_ring, full, empty, asked)
    if weight_scale is not None:
        raw_ring = gl.allocate_shared_memory(weight.dtype, [RAW_STAGES, BN, BK], weight.layout)
        raw_full = gl.allocate_shared_memory(gl.int64, [RAW_STAGES, 1], mbarrier.MBarrierLayout())
        raw_empty = gl.allocate_shared_memory(gl.int64, [RAW_STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(RAW_STAGES):
            mbarrier.init(raw_full.index(stage), count=1)
            mbarrier.init(raw_empty.index(stage), count=1)
        rings = (hidden_ring, weight_ring, full, empty, asked, raw_ring, raw_full, raw_empty)
    fence_async_shared()
    if STATIONARY:  # it may be launched before the previous kernel has ended
        gdc_wait()
    gdc_launch_dependents()  # lets the reduce kernel start, which waits for the results of this one
    program = gl.program_id(0)
    count = load_row_count(row_count, capacity)
    schedule = schedule_tiles(count, vocab, BM, BN, PROGRAMS, FIXED)
    # A constexpr that is put into a variable is no longer one, so each call spells its constant arguments out.
    work = (program, count_items(program, schedule, PROGRAMS, FIXED), schedule)
    rows = (hidden, weight_scale, bias, row_index, temperature, uniform_temperature, seed, keys, statistics, leaders)
    sizes = (count, vocab, hidden_rows, hidden_dim, hidden_stride, scale, soft_cap, first_id)
    if weight_scale is not None:
        tiles = (raw_ring, raw_full, raw_empty, weight_ring, full, empty)
        if CONSUMERS == 1:
            gl.warp_specialize(
                [
                    (_consume, (
                        rows, sizes, rings, work, K_TILES, 0, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY,
                        HEAD_START, MODE, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX, OF_SAMPLER, HAS_SCALE, HAS_CAP,
                    )),
                    (convert_tiles, (tiles, work, K_TILES, PROGRAMS, FIXED, 0, 2)),
                    (convert_tiles, (tiles, work, K_TILES, PROGRAMS, FIXED, 1, 2)),
                    (produce_tiles, (
                        hidden, weight, rings, work, K_TILES, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY,
                        HEAD_START,
                    )),
                ],
                [4, 4, 1],
                [CONVERTER_REGISTERS, CONVERTER_REGISTERS, 24],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_consume, (
                        rows, sizes, rings, work, K_TILES, 0, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY,
                        HEAD_START, MODE, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX, OF_SAMPLER, HAS_SCALE, HAS_CAP,
                    )),
                    (_consume, (
                        rows, sizes, rings, work, K_TILES, 1, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY,
                        HEAD_START, MODE, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX, OF_SAMPLER, HAS_SCALE, HAS_CAP,
                    )),
                    (convert_tiles, (tiles, work, K_TILES, PROGRAMS, FIXED, 0, 2)),
                    (convert_tiles, (tiles, work, K_TILES, PROGRAMS, FIXED, 1, 2)),
                    (produce_tiles, (
                        hidden, weight, rings, work, K_TILES, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY,
                        HEAD_START,
                    )),
                ],
                [4, 4, 4, 1],
                [REGISTERS, CONVERTER_REGISTERS, CONVERTER_REGISTERS, 24],
            )  # fmt: skip
    elif CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (
                    rows, sizes, rings, work, K_TILES, 0, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY, HEAD_START,
                    MODE, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX, OF_SAMPLER, HAS_SCALE, HAS_CAP,
                )),
                (produce_tiles, (
                    hidden, weight, rings, work, K_TILES, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY,
                    HEAD_START,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    rows, sizes, rings, work, K_TILES, 0, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY, HEAD_START,
                    MODE, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX, OF_SAMPLER, HAS_SCALE, HAS_CAP,
                )),
                (_consume, (
                    rows, sizes, rings, work, K_TILES, 1, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY, HEAD_START,
                    MODE, WANT_TOP, WANT_ENTROPY, WANT_ARGMAX, OF_SAMPLER, HAS_SCALE, HAS_CAP,
                )),
                (produce_tiles, (
                    hidden, weight, rings, work, K_TILES, PROGRAMS, FIXED, BM, BN, BK, STAGES, STATIONARY,
                    HEAD_START,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
