"""`mdkern.kernels.backbone.linear_fp8.scaled_gelu` for Hopper, in Gluon, of rows that stay in shared memory.

In e4m3 192 rows of up to 768 columns fit into shared memory. They are read once for all columns of the result, so that
only the weight comes through the ring. A unit of work is 192 rows by 256 columns; a program takes consecutive units.
The two consumer warpgroups take turns: while one multiplies its 128 columns, the other finishes and stores its last
ones, so that the tensor cores do not wait for the epilogue (the "ping-pong" schedule of CUTLASS). Measurements:
docs/notes/backbone.md.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mdkern.kernels.backbone.hopper_linear import (
    BLOCKS,
    COLUMNS,
    PLAIN,
    _activate,
    _affine,
    _leave,
    _set_aside,
)
from mdkern.kernels.backbone.hopper_tile import PART, ROWS, WARPGROUPS, WIDE, _halves
from mdkern.kernels.gluon_common import ring_advance


@gluon.jit
def _share(units, PROGRAMS: gl.constexpr):
    """First and last unit of a program."""
    program = gl.program_id(0)
    each, more = units // PROGRAMS, units % PROGRAMS
    first = program * each + gl.minimum(program, more)
    return first, first + each + (program < more).to(gl.int32)


@gluon.jit
def _produce(
    left,
    right,
    rings,
    barriers,
    sizes,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    STEPS: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """The producer warp: copies rows when they change, and the weight's tiles into the ring."""
    rows_held, right_ring, _, _, full, empty = rings
    rows_full, rows_empty, _ = barriers
    row_tiles, column_tiles = sizes
    BM: gl.constexpr = ROWS * BLOCKS
    first, last = _share(row_tiles * column_tiles, PROGRAMS)
    stage = first * 0
    phase = stage + 1
    rows_phase = stage + 1
    held = stage - 1  # the row tile that lies in shared memory
    for unit in range(first, last):
        row_tile = unit // column_tiles
        column = unit % column_tiles * COLUMNS * WARPGROUPS
        for half in gl.static_range(WARPGROUPS):
            for k in range(STEPS):
                if half == 0:  # noqa: SIM102  known when it is compiled, unlike the next
                    if row_tile != held:
                        mbarrier.wait(rows_empty.index(k), rows_phase)
                        mbarrier.expect(rows_full.index(k), BM * BK)
                        for block in gl.static_range(BLOCKS):
                            at = [row_tile * BM + ROWS * block, k * BK]
                            buffer = rows_held.index(k * BLOCKS + block)
                            tma.async_copy_global_to_shared(left, at, rows_full.index(k), buffer)
                mbarrier.wait(empty.index(stage), phase)
                ready = full.index(stage)
                mbarrier.expect(ready, COLUMNS * BK)
                at = [column + COLUMNS * half, k * BK]
                tma.async_copy_global_to_shared(right, at, ready, right_ring.index(stage))
                stage, phase = ring_advance(stage, phase, STAGES)
        if row_tile != held:
            rows_phase ^= 1
            held = row_tile


@gluon.jit
def _skip(stage, phase, STEPS: gl.constexpr, STAGES: gl.constexpr):
    """Pass over the stages of the other warpgroup."""
    for _ in gl.static_range(STEPS):
        stage, phase = ring_advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _step(products, rings, barriers, stage, phase, k, rows_phase, FIRST: gl.constexpr):
    """Start the multiplication of one step of the inner dimension; it is not waited for here."""
    rows_held, right_ring, _, _, full, _ = rings
    rows_full, _, _ = barriers
    mbarrier.wait(rows_full.index(k), rows_phase)
    mbarrier.wait(full.index(stage), phase)
    right = right_ring.index(stage).permute((1, 0))
    begun = ()
    for block in gl.static_range(BLOCKS):
        left = rows_held.index(k * BLOCKS + block)
        begun = begun + (warpgroup_mma(left, right, products[block], use_acc=not FIRST, is_async=True),)
    return begun


@gluon.jit
def _consume(
    out,
    tables,
    rings,
    barriers,
    sizes,
    rows,
    HALF: gl.constexpr,  # which half of a unit's columns
    PROGRAMS: gl.constexpr,
    STEPS: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """A consumer warpgroup: multiplies its half of each unit in its turn, and finishes it beside the other's turn."""
    _, right_ring, leaving, _, _, empty = rings
    _, rows_empty, turns = barriers
    row_tiles, column_tiles = sizes
    STAGES: gl.constexpr = right_ring.shape[0]
    FACTOR: gl.constexpr = 0.5  # as `_activate` takes half of its argument
    product_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, COLUMNS, 256 // right_ring.dtype.primitive_bitwidth]
    )
    first, last = _share(row_tiles * column_tiles, PROGRAMS)
    stage = first * 0
    phase = first * 0
    turn = first * 0 + 1 - HALF  # the first warpgroup begins
    rows_phase = first * 0 + 1
    held = first * 0 - 1
    if HALF == 1:
        stage, phase = _skip(stage, phase, STEPS, STAGES)
    for unit in range(first, last):
        row_tile = unit // column_tiles
        rows_phase ^= (row_tile != held).to(gl.int32)
        held = row_tile
        leaves = (unit + 1 == last) | ((unit + 1) // column_tiles != row_tile)  # the rows are not needed any more
        row = row_tile * ROWS * BLOCKS
        column = unit % column_tiles * COLUMNS * WARPGROUPS + HALF * COLUMNS
        nothing = gl.zeros([ROWS, COLUMNS], gl.float32, layout=product_layout)
        # Phases of a barrier are told apart by their parity. Without turns a warpgroup could be two phases ahead.
        mbarrier.wait(turns.index(HALF), turn)
        turn ^= 1
        products = _step((nothing, nothing, nothing), rings, barriers, stage, phase, 0, rows_phase, True)
        _set_aside(tables, rings, row, column, rows, HALF, 0, 1, FACTOR)
        a, b, c = warpgroup_mma_wait(BLOCKS, deps=products)  # lets all three run on
        previous = stage + 0  # a copy, as the compiler would take `stage` itself for a constant of the loop
        stage, phase = ring_advance(stage, phase, STAGES)
        for k in range(1, STEPS):
            products = _step((a, b, c), rings, barriers, stage, phase, k, rows_phase, False)
            a, b, c = warpgroup_mma_wait(BLOCKS, deps=products)
            mbarrier.arrive(empty.index(previous))
            mbarrier.arrive(rows_empty.index(k - 1), pred=leaves)
            previous = stage + 0
            stage, phase = ring_advance(stage, phase, STAGES)
        mbarrier.arrive(turns.index(1 - HALF))
        a, b, c = warpgroup_mma_wait(0, deps=(a, b, c))
        mbarrier.arrive(empty.index(previous))
        mbarrier.arrive(rows_empty.index(STEPS - 1), pred=leaves)
        stage, phase = _skip(stage, phase, STEPS, STAGES)

        for block in gl.static_range(BLOCKS):
            at = row + ROWS * block
            near, far = _halves(a if block == 0 else b if block == 1 else c, WIDE)
            near = _affine(near, tables, rings, HALF, block, 0, FACTOR)
            near = _activate(near, tables, rings, HALF, 0)
            _leave(near, out, leaving, at, column, HALF, 2 * block, BUFFERS)
            far = _affine(far, tables, rings, HALF, block, 1, FACTOR)
            far = _activate(far, tables, rings, HALF, 1)
            _leave(far, out, leaving, at, column + PART, HALF, 2 * block + 1, BUFFERS)
    tma.store_wait(0)


# These arguments are not specialised, so that a new batch size compiles nothing.
COUNTS = ("row_tiles", "column_tiles", "rows")


@gluon.jit(do_not_specialize=COUNTS)
def resident_kernel(
    left,  # descriptor of [M, K]
    right,  # descriptor of [N, K]
    out,  # descriptor of [M, N]
    bias,
    scale,
    level,
    row_tiles,
    column_tiles,
    rows,
    BK: gl.constexpr,
    STEPS: gl.constexpr,  # K / BK
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,  # output buffers of a warpgroup, 64 x 64 each
    PROGRAMS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    rows_held = gl.allocate_shared_memory(left.dtype, [STEPS * BLOCKS, ROWS, BK], left.layout)
    right_ring = gl.allocate_shared_memory(right.dtype, [STAGES, COLUMNS, BK], right.layout)
    leaving = gl.allocate_shared_memory(out.dtype, [WARPGROUPS * BUFFERS, ROWS, PART], out.layout)
    shifts = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, COLUMNS], PLAIN)
    scales = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, COLUMNS], PLAIN)
    levels = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, COLUMNS], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    rows_full = gl.allocate_shared_memory(gl.int64, [STEPS, 1], mbarrier.MBarrierLayout())
    rows_empty = gl.allocate_shared_memory(gl.int64, [STEPS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(WARPGROUPS):
        mbarrier.init(turns.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for k in gl.static_range(STEPS):
        mbarrier.init(rows_full.index(k), count=1)
        mbarrier.init(rows_empty.index(k), count=WARPGROUPS)
    fence_async_shared()
    # A constexpr that is put into a variable is no longer one, so each call spells its constant arguments out.
    rings = (rows_held, right_ring, leaving, (shifts, shifts, scales, levels), full, empty)
    barriers = (rows_full, rows_empty, turns)
    sizes = (row_tiles, column_tiles)
    tables = (bias, None, None, None, scale, level)
    gl.warp_specialize(
        [
            (_consume, (out, tables, rings, barriers, sizes, rows, 0, PROGRAMS, STEPS, BUFFERS)),
            (_consume, (out, tables, rings, barriers, sizes, rows, 1, PROGRAMS, STEPS, BUFFERS)),
            (_produce, (left, right, rings, barriers, sizes, BK, STAGES, STEPS, PROGRAMS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
