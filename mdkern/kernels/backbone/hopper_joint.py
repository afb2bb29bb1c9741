"""`mdkern.kernels.backbone.joint` for Hopper, in Gluon: products with several weights, which stay where they are.

As in `hopper_linear` one persistent program runs on each multiprocessor: a producer warp copies tiles into a ring in
shared memory, two or three consumer warpgroups multiply them. The weights are the left operand, in blocks of 64 rows of
one weight each, so that a tile may lie across the border between two; the rows of x are the right one. Each warpgroup
has one block and all rows of x, or half of the rows if there is one block only. The product lies transposed in
registers and is turned on its way through shared memory.

Gate and up are read as one tensor ``[groups of 8 rows, 2, 8, K]``, whose second stride is the distance between the two
weights in memory. A block of 64 rows then has 8 rows of the one and 8 of the other in turn, which a tensor core
leaves in registers of the same thread, where the activation needs them.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005, SIM114  (conditions of the compiler's and of the program's are apart)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mdkern.kernels.backbone.hopper_tile import ROWS, _corner
from mdkern.kernels.gluon_common import ring_advance
from mdkern.kernels.triton_common import LOG2E, halves

TOGETHER = gl.constexpr(8)  # rows of gate, and of up, that are next to each other in a block
PIECE = gl.constexpr(128)  # rows of x that are stored at a time, at most


@gluon.jit
def _place(
    tile, row_tiles, column_tiles, TALL: gl.constexpr, WIDE: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr
):
    """Which part of the inner dimension a tile has, and its first row and column."""
    part = tile * 0
    if PARTS > 1:
        part = tile // (row_tiles * column_tiles)
        tile -= part * row_tiles * column_tiles
    row, column = _corner(tile, row_tiles, column_tiles, TALL, WIDE, GROUP)
    return part, row, column


@gluon.jit
def _copy_block(weights, ends, column, depth, ready, buffer, GATED: gl.constexpr):
    """Copy a block: 64 rows of the weight that has this column of the output, or 32 of gate and 32 of up."""
    first, second, third = weights
    end, next_end, _ = ends
    if GATED:
        tma.async_copy_global_to_shared(first, [column // TOGETHER, 0, 0, depth], ready, buffer)
    elif second is None:
        tma.async_copy_global_to_shared(first, [column, depth], ready, buffer)
    elif column < end:
        tma.async_copy_global_to_shared(first, [column, depth], ready, buffer)
    elif third is None:
        tma.async_copy_global_to_shared(second, [column - end, depth], ready, buffer)
    elif column < next_end:
        tma.async_copy_global_to_shared(second, [column - end, depth], ready, buffer)
    else:
        tma.async_copy_global_to_shared(third, [column - next_end, depth], ready, buffer)


@gluon.jit
def _produce(
    weights,
    x,
    ends,
    rings,
    sizes,
    GATED: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    PARTS: gl.constexpr,
    EARLY: gl.constexpr,
):
    """The producer warp: copies tiles into the ring.

    With EARLY, the weights of the first steps are copied before the kernel before this one has ended.
    """
    left_ring, right_ring, leaving, full, empty = rings
    row_tiles, column_tiles, steps = sizes
    STAGES: gl.constexpr = right_ring.shape[0]
    TALL: gl.constexpr = right_ring.shape[1]
    BK: gl.constexpr = right_ring.shape[2]
    BLOCKS: gl.constexpr = left_ring.shape[0] // STAGES
    WIDTH: gl.constexpr = leaving.shape[2]
    BYTES: gl.constexpr = (BLOCKS * ROWS + TALL) * BK * x.dtype.primitive_bitwidth // 8
    program = gl.program_id(0)
    stage = program * 0
    phase = stage + 1
    tiles = row_tiles * column_tiles * PARTS
    begun = program * 0  # steps of the first tile that are on their way
    if EARLY:
        if program < tiles:
            begun = gl.minimum(steps, STAGES)
        first = gl.minimum(program, tiles - 1)
        part, row, column = _place(first, row_tiles, column_tiles, TALL, WIDTH * BLOCKS, GROUP, PARTS)
        for k in range(begun):
            mbarrier.expect(full.index(k), BYTES)
            for block in gl.static_range(BLOCKS):
                buffer = left_ring.index(k * BLOCKS + block)
                depth = (part * steps + k) * BK
                _copy_block(weights, ends, column + WIDTH * block, depth, full.index(k), buffer, GATED)
        gdc_wait()
        gdc_launch_dependents()
        for k in range(begun):
            depth = (part * steps + k) * BK
            tma.async_copy_global_to_shared(x, [row, depth], full.index(k), right_ring.index(k))
            stage, phase = ring_advance(stage, phase, STAGES)
    for tile in range(program, tiles, PROGRAMS):
        part, row, column = _place(tile, row_tiles, column_tiles, TALL, WIDTH * BLOCKS, GROUP, PARTS)
        # Not a variable that is 0 from the second tile on: the compiler would keep its first value.
        for k in range(gl.where(tile == program, begun, 0), steps):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, BYTES)
            depth = (part * steps + k) * BK
            tma.async_copy_global_to_shared(x, [row, depth], ready, right_ring.index(stage))
            for block in gl.static_range(BLOCKS):
                buffer = left_ring.index(stage * BLOCKS + block)
                _copy_block(weights, ends, column + WIDTH * block, depth, ready, buffer, GATED)
            stage, phase = ring_advance(stage, phase, STAGES)


@gluon.jit
def _step(product, rings, stage, phase, NUMBER: gl.constexpr, FIRST: gl.constexpr):
    """Start the multiplication of one step of the inner dimension, and wait for the step before it."""
    left_ring, right_ring, _, full, _ = rings
    BLOCKS: gl.constexpr = left_ring.shape[0] // right_ring.shape[0]
    mbarrier.wait(full.index(stage), phase)
    if BLOCKS == 1:
        left = left_ring.index(stage)
        right = right_ring.index(stage).slice(NUMBER * product.shape[1], product.shape[1], dim=0)
    else:
        left = left_ring.index(stage * BLOCKS + NUMBER)
        right = right_ring.index(stage)
    left = left.reshape((ROWS, right_ring.shape[2]))
    product = warpgroup_mma(left, right.permute((1, 0)), product, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(1, deps=(product,))


@gluon.jit
def _shift(biases, ends, column, swapped, GATED: gl.constexpr, LAYOUT: gl.constexpr):
    """The biases of a block's 64 rows."""
    first, second, third = biases
    end, next_end, last = ends
    within = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    if GATED:
        at = column + within // (2 * TOGETHER) * TOGETHER + within % TOGETHER
        of_up = (within // TOGETHER % 2) != swapped
        shift = gl.load(first + at, mask=(at < end) & (of_up == 0), other=0.0).to(gl.float32)
        shift += gl.load(second + at, mask=(at < end) & of_up, other=0.0).to(gl.float32)
    else:
        at = column + within
        shift = gl.load(first + at, mask=at < end, other=0.0).to(gl.float32)
        if second is not None:
            shift += gl.load(second + at - end, mask=(at >= end) & (at < next_end), other=0.0).to(gl.float32)
        if third is not None:
            shift += gl.load(third + at - next_end, mask=(at >= next_end) & (at < last), other=0.0).to(gl.float32)
    return shift


@gluon.jit
def _activate(x, swapped):
    """``silu(gate) * up`` of a block ``[64, C]``: ``[32, C]``, without moving a register."""
    near, far = x.reshape(ROWS // (2 * TOGETHER), 2, TOGETHER, x.shape[1]).permute(0, 2, 3, 1).split()
    gate = gl.where(swapped != 0, far, near)
    up = gl.where(swapped != 0, near, far)
    return (gate * up / (1.0 + gl.exp2(-LOG2E * gate))).reshape(ROWS // 2, x.shape[1])


@gluon.jit
def _leave(x, out, buffer, row, column, swapped, GATED: gl.constexpr):
    """Finish a piece of the product and store it."""
    if GATED:
        x = _activate(x, swapped)
    tma.store_wait(0)  # the earlier store from this buffer has read it
    buffer.permute((1, 0)).store(x.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], buffer)


@gluon.jit
def _consume(
    out,
    biases,
    ends,
    rings,
    sizes,
    swapped,
    NUMBER: gl.constexpr,  # of the warpgroup
    GATED: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    PARTS: gl.constexpr,
):
    """A consumer warpgroup: multiplies the tiles and finishes their product."""
    left_ring, right_ring, leaving, _, empty = rings
    row_tiles, column_tiles, steps = sizes
    STAGES: gl.constexpr = right_ring.shape[0]
    TALL: gl.constexpr = right_ring.shape[1]
    BLOCKS: gl.constexpr = left_ring.shape[0] // STAGES
    WIDTH: gl.constexpr = leaving.shape[2]
    SHARE: gl.constexpr = TALL // 2 if BLOCKS == 1 else TALL
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHARE, 16])
    program = gl.program_id(0)
    stage = program * 0
    phase = program * 0
    for tile in range(program, row_tiles * column_tiles * PARTS, PROGRAMS):
        part, row, column = _place(tile, row_tiles, column_tiles, TALL, WIDTH * BLOCKS, GROUP, PARTS)
        row += part * row_tiles * TALL
        if BLOCKS == 1:
            row += NUMBER * SHARE
        else:
            column += NUMBER * WIDTH
        if biases[0] is not None:
            shift = _shift(biases, ends, column, swapped, GATED, LAYOUT)
            if PARTS > 1:
                shift = gl.where(part == 0, shift, 0.0)
        product = gl.zeros([ROWS, SHARE], gl.float32, layout=LAYOUT)
        product = _step(product, rings, stage, phase, NUMBER, True)
        previous = stage + 0  # a copy, as the compiler would take `stage` itself for a constant of the loop
        stage, phase = ring_advance(stage, phase, STAGES)
        for _k in range(1, steps):
            product = _step(product, rings, stage, phase, NUMBER, False)
            mbarrier.arrive(empty.index(previous))
            previous = stage + 0
            stage, phase = ring_advance(stage, phase, STAGES)

        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(previous))
        if biases[0] is not None:
            product += shift[:, None]
        buffer = leaving.index(NUMBER)
        if SHARE > PIECE:
            upper, lower = halves(product)
            _leave(upper, out, buffer, row, column, swapped, GATED)
            _leave(lower, out, buffer, row + PIECE, column, swapped, GATED)
        else:
            _leave(product, out, buffer, row, column, swapped, GATED)
    tma.store_wait(0)


# These arguments are not specialised, so that new sizes compile nothing.
COUNTS = ("first_end", "second_end", "third_end", "row_tiles", "column_tiles", "steps", "swapped")


@gluon.jit(do_not_specialize=COUNTS)
def joint_kernel(
    first,  # descriptor of [C, K], or of gate and up together
    second,
    third,
    x,  # descriptor of [M, K]
    out,  # descriptor of [M, all C], or, one below the other, of the parts, with the rows of all their tiles each
    first_bias,  # of all weights or of none
    second_bias,
    third_bias,
    first_end,  # columns of the output up to the end of each weight's
    second_end,
    third_end,
    row_tiles,
    column_tiles,
    steps,  # of a part
    swapped,  # up, not gate, is the first one in memory
    GATED: gl.constexpr,
    BLOCKS: gl.constexpr,  # blocks of 64 rows of weights in a tile, 1 to 3
    TALL: gl.constexpr,  # rows of x in a tile
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PARTS: gl.constexpr,  # of the inner dimension, whose products are not added up
    EARLY: gl.constexpr,  # launched before the kernel before it has ended
):
    WARPGROUPS: gl.constexpr = 2 if BLOCKS == 1 else BLOCKS
    BLOCK: gl.constexpr = [ROWS // (2 * TOGETHER), 2, TOGETHER, BK] if GATED else [ROWS, BK]
    left_ring = gl.allocate_shared_memory(first.dtype, [STAGES * BLOCKS] + BLOCK, first.layout)
    right_ring = gl.allocate_shared_memory(x.dtype, [STAGES, TALL, BK], x.layout)
    leaving = gl.allocate_shared_memory(out.dtype, [WARPGROUPS] + out.block_shape, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    # A constexpr that is put into a variable is no longer one, so each call spells its constant arguments out.
    rings = (left_ring, right_ring, leaving, full, empty)
    sizes = (row_tiles, column_tiles, steps)
    weights = (first, second, third)
    biases = (first_bias, second_bias, third_bias)
    ends = (first_end, second_end, third_end)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (out, biases, ends, rings, sizes, swapped, 0, GATED, GROUP, PROGRAMS, PARTS)),
                (_consume, (out, biases, ends, rings, sizes, swapped, 1, GATED, GROUP, PROGRAMS, PARTS)),
                (_produce, (weights, x, ends, rings, sizes, GATED, GROUP, PROGRAMS, PARTS, EARLY)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (out, biases, ends, rings, sizes, swapped, 0, GATED, GROUP, PROGRAMS, PARTS)),
                (_consume, (out, biases, ends, rings, sizes, swapped, 1, GATED, GROUP, PROGRAMS, PARTS)),
                (_consume, (out, biases, ends, rings, sizes, swapped, 2, GATED, GROUP, PROGRAMS, PARTS)),
                (_produce, (weights, x, ends, rings, sizes, GATED, GROUP, PROGRAMS, PARTS, EARLY)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
