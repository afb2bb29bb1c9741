"""`linear_residual` of `mdkern.kernels.backbone.linear` for Hopper, in Gluon: a product added to the residual stream.

One persistent program runs on each multiprocessor. A producer warp copies tiles into a ring in shared memory, and runs
ahead past the end of an output tile; two consumer warpgroups each multiply 64 rows by 256 columns and finish them in
registers. The stream's tile is loaded during the multiplication, into the buffers that it is stored from afterwards.
The epilogue also sums the rows, for the layer normalisation in the next product (`kernels.backbone.folded_norm`). Of
matrices in e4m3 the gate is the scale, and the bias is added after it (`kernels.backbone.linear_fp8`).
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

from mdkern.kernels.backbone.hopper_tile import PART, ROWS, SPAN, WARPGROUPS, WIDE, _corner, _halves
from mdkern.kernels.backbone.triton_folded_norm import pair_sums, quad_sums
from mdkern.kernels.gluon_common import ring_advance

FLAT = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PARTS = gl.constexpr(SPAN.value // PART.value)  # parts of a warpgroup's tile, which is one span wide
HALF_SPAN = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))


@gluon.jit
def _copy_step(left, right, rings, row, column, k, stage, phase, BK: gl.constexpr):
    """Copy what a tile needs of one step of the inner dimension."""
    left_ring, right_ring, _, _, full, empty, _, _ = rings
    BYTES: gl.constexpr = BK * left.dtype.primitive_bitwidth // 8
    mbarrier.wait(empty.index(stage), phase)
    ready = full.index(stage)
    mbarrier.expect(ready, (ROWS * WARPGROUPS + SPAN) * BYTES)
    tma.async_copy_global_to_shared(right, [column, k * BK], ready, right_ring.index(stage))
    tma.async_copy_global_to_shared(left, [row, k * BK], ready, left_ring.index(stage))


@gluon.jit
def _copy_stream(stream, rings, row, column, phase):
    """Copy the tile of the stream, once the one before has left its buffers."""
    _, _, leaving, _, _, _, stream_full, stream_empty = rings
    for half in gl.static_range(WARPGROUPS):
        mbarrier.wait(stream_empty.index(half), phase)
        mbarrier.expect(stream_full.index(half), ROWS * SPAN * 2)
        for part in gl.static_range(PARTS):
            at = [row + ROWS * half, column + PART * part]
            tma.async_copy_global_to_shared(stream, at, stream_full.index(half), leaving.index(half * PARTS + part))


@gluon.jit
def _produce(
    left,
    right,
    stream,
    rings,
    sizes,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """The producer warp: copies tiles into the ring."""
    row_tiles, column_tiles, steps = sizes
    program = gl.program_id(0)
    stage = program * 0
    phase = stage + 1
    stream_phase = stage + 1
    for tile in range(program, row_tiles * column_tiles, PROGRAMS):
        row, column = _corner(tile, row_tiles, column_tiles, ROWS * WARPGROUPS, SPAN, GROUP)
        for k in range(steps):
            _copy_step(left, right, rings, row, column, k, stage, phase, BK)
            stage, phase = ring_advance(stage, phase, STAGES)
            if k == steps // 2:
                _copy_stream(stream, rings, row, column, stream_phase)
        stream_phase ^= 1


@gluon.jit
def _scaled(x, aside, HALF: gl.constexpr, NUMBER: gl.constexpr):
    """A 64 x 64 part of the product times the scale of its columns, plus the bias."""
    shift = aside.index(2 * HALF).slice(NUMBER * PART, PART).load(gl.SliceLayout(0, WIDE))
    factor = aside.index(2 * HALF + 1).slice(NUMBER * PART, PART).load(gl.SliceLayout(0, WIDE))
    return x * factor[None, :] + shift[None, :]


@gluon.jit
def _row_sums(x):
    """Sums of rows of 64 columns. Four threads hold a row; they exchange their sums with the second next one first."""
    return gl.convert_layout(gl.sum(quad_sums(x), 1), gl.SliceLayout(1, WIDE), True)


@gluon.jit
def _consume(
    stream,
    tables,
    rings,
    sizes,
    places,
    HALF: gl.constexpr,  # which 64 of the tile's rows
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    SCALED: gl.constexpr,  # the gate is a scale in float32, and the bias is added after it
):
    """A consumer warpgroup: multiplies the tiles and adds their product to the stream."""
    bias, gate, sums = tables
    left_ring, right_ring, leaving, aside, full, empty, stream_full, stream_empty = rings
    row_tiles, column_tiles, steps = sizes
    rows, rows_of_sequence, last_sequence, gate_stride = places
    STAGES: gl.constexpr = left_ring.shape[0]
    product_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, SPAN, 256 // right_ring.dtype.primitive_bitwidth]
    )
    program = gl.program_id(0)
    stage = program * 0
    phase = program * 0
    stream_phase = program * 0
    for tile in range(program, row_tiles * column_tiles, PROGRAMS):
        row, column = _corner(tile, row_tiles, column_tiles, ROWS * WARPGROUPS, SPAN, GROUP)
        row += HALF * ROWS
        # The epilogue's inputs are fetched at the start of the tile, so that nothing waits for them at its end.
        within = gl.arange(0, PART, layout=gl.SliceLayout(0, WIDE))
        sequence = gl.minimum(row // rows_of_sequence, last_sequence)  # rows of the last tile may lie past the end
        sequence_gate = gate + sequence.to(gl.int64) * gate_stride
        shifts = ()
        factors = ()
        if SCALED:  # no room in registers
            whole = column + gl.arange(0, SPAN, layout=FLAT)
            aside.index(2 * HALF).store(gl.load(bias + whole))
            aside.index(2 * HALF + 1).store(gl.load(gate + whole))
        else:
            for part in gl.static_range(PARTS):
                at = gl.multiple_of(column + PART * part, PART) + within
                if bias is not None:
                    shifts = shifts + (gl.load(bias + at),)
                factors = factors + (gl.load(sequence_gate + at),)
        product = gl.zeros([ROWS, SPAN], gl.float32, layout=product_layout)
        previous = stage + 0  # a copy, as the compiler would take `stage` itself for a constant of the loop
        for k in range(steps):
            mbarrier.wait(full.index(stage), phase)
            ours = left_ring.index(stage).slice(HALF * ROWS, ROWS, dim=0)
            theirs = right_ring.index(stage).permute((1, 0))
            product = warpgroup_mma(ours, theirs, product, use_acc=k > 0, is_async=True)
            if k == 0:  # by now the last tile has been stored from the buffer
                tma.store_wait(0)
                mbarrier.arrive(stream_empty.index(HALF), pred=tile != program)
            product = warpgroup_mma_wait(1, deps=(product,))
            mbarrier.arrive(empty.index(previous), pred=k > 0)
            previous = stage + 0
            stage, phase = ring_advance(stage, phase, STAGES)

        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(previous))

        left, right = _halves(product, HALF_SPAN)
        parts = _halves(left, WIDE) + _halves(right, WIDE)
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, WIDE))
        squares = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, WIDE))
        mbarrier.wait(stream_full.index(HALF), stream_phase)
        stream_phase ^= 1
        for two in gl.static_range(PARTS // 2):
            first, second = parts[2 * two], parts[2 * two + 1]
            near, far = leaving.index(HALF * PARTS + 2 * two), leaving.index(HALF * PARTS + 2 * two + 1)
            if SCALED:
                first = _scaled(first, aside, HALF, 2 * two)
                second = _scaled(second, aside, HALF, 2 * two + 1)
            else:
                if bias is not None:
                    first += shifts[2 * two].to(gl.float32)[None, :]
                    second += shifts[2 * two + 1].to(gl.float32)[None, :]
                first = first * factors[2 * two].to(gl.float32)[None, :]
                second = second * factors[2 * two + 1].to(gl.float32)[None, :]
            held = near.load(WIDE), far.load(WIDE)
            first += held[0].to(gl.float32)
            second += held[1].to(gl.float32)
            if sums is not None:  # of the values before rounding, which are still in registers
                added, squared = pair_sums(first, second)
                total += _row_sums(added)
                squares += _row_sums(squared)
            near.store(first.to(stream.dtype))
            far.store(second.to(stream.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(stream, [row, column + 2 * PART * two], near)
            tma.async_copy_shared_to_global(stream, [row, column + 2 * PART * two + PART], far)
        if sums is not None:
            at = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
            ours = sums + column // SPAN * 2 * rows + at
            gl.store(ours, total, mask=at < rows)
            gl.store(ours + rows, squares, mask=at < rows)
    tma.store_wait(0)


# These arguments are not specialised, so that a new batch size compiles nothing.
COUNTS = ("row_tiles", "column_tiles", "steps", "rows", "rows_of_sequence", "last_sequence")


@gluon.jit(do_not_specialize=COUNTS)
def linear_residual_kernel(
    left,  # descriptor of [M, K]
    right,  # descriptor of [N, K]
    stream,  # descriptor of [M, N], added to
    bias,
    gate,
    sums,
    row_tiles,
    column_tiles,
    steps,
    rows,
    rows_of_sequence,
    last_sequence,
    gate_stride,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    SCALED: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    left_ring = gl.allocate_shared_memory(left.dtype, [STAGES, ROWS * WARPGROUPS, BK], left.layout)
    right_ring = gl.allocate_shared_memory(right.dtype, [STAGES, SPAN, BK], right.layout)
    leaving = gl.allocate_shared_memory(stream.dtype, [WARPGROUPS * PARTS, ROWS, PART], stream.layout)
    aside = gl.allocate_shared_memory(gl.float32, [2 * WARPGROUPS, SPAN], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    stream_full = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    stream_empty = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(WARPGROUPS):
        mbarrier.init(stream_full.index(half), count=1)
        mbarrier.init(stream_empty.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    # A constexpr that is put into a variable is no longer one, so each call spells its constant arguments out.
    rings = (left_ring, right_ring, leaving, aside, full, empty, stream_full, stream_empty)
    sizes = (row_tiles, column_tiles, steps)
    places = (rows, rows_of_sequence, last_sequence, gate_stride)
    tables = (bias, gate, sums)
    gl.warp_specialize(
        [
            (_consume, (stream, tables, rings, sizes, places, 0, GROUP, PROGRAMS, SCALED)),
            (_consume, (stream, tables, rings, sizes, places, 1, GROUP, PROGRAMS, SCALED)),
            (_produce, (left, right, stream, rings, sizes, BK, STAGES, GROUP, PROGRAMS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
