"""What `hopper_attention` and `hopper_attention_fp8` share: the order of tiles, copies of them, products, and results.

A program has a producer warp, which copies keys and values into a ring in shared memory, and the next tile's queries
ahead, and consumer warpgroups with 64 queries each (FlashAttention-3, 2407.08608). Matrices are described by sequence,
so that what lies beyond one's end is read as 0 and not written.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from mdkern.kernels.backbone import attention
from mdkern.kernels.backbone.hopper_tile import ROWS
from mdkern.kernels.gluon_common import ring_advance

HEAD = gl.constexpr(attention.HEAD_DIM)


@constexpr_function
def layout_of(columns, bits):
    """Where a product of 64 rows and so many columns, of factors of so many bits, lies in registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 256 // bits])


@gluon.jit
def _place(tile, sizes, GROUPS: gl.constexpr, HEADS: gl.constexpr):
    """First query, sequence and head of a tile. The tiles of a head follow each other, as they read the same keys."""
    _, row_tiles, _ = sizes
    head = tile // row_tiles
    return tile % row_tiles * (ROWS * GROUPS), head // HEADS, head % HEADS


@gluon.jit
def _barriers(GROUPS: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr):
    """Of buffers of queries, and of keys and values: those that say that one is full, and that it is empty."""
    held_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    held_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(AHEAD):
        mbarrier.init(held_full.index(place), count=1)
        mbarrier.init(held_empty.index(place), count=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    return held_full, held_empty, full, empty


@gluon.jit
def _produce(
    inputs,
    rings,
    barriers,
    sizes,
    GROUPS: gl.constexpr,
    HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """The producer warp: copies queries, and keys and values from the last ones on.

    Keys come with the values of the keys before them, with which their scores are computed; the first with values
    beyond the end, and the last values with keys before the beginning, for which the copies put zeros.
    """
    query, key, values = inputs
    held, key_ring, value_ring = rings
    held_full, held_empty, full, empty = barriers
    tiles, _, length = sizes
    KEYS: gl.constexpr = key.block_shape[1]
    BITS: gl.constexpr = key.dtype.primitive_bitwidth
    BYTES: gl.constexpr = HEAD * BITS // 8  # of a head's row
    stage = gl.program_id(0) * 0
    phase = stage + 1
    place = stage + 0
    turn = stage + 1
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        row, sequence, head = _place(tile, sizes, GROUPS, HEADS)
        mbarrier.wait(held_empty.index(place), turn)
        ready = held_full.index(place)
        mbarrier.expect(ready, GROUPS * ROWS * BYTES)
        for group in gl.static_range(GROUPS):
            at = [sequence, row + ROWS * group, head * HEAD]
            tma.async_copy_global_to_shared(query, at, ready, held.index(place * GROUPS + group))
        place, turn = ring_advance(place, turn, AHEAD)
        last = (length - 1) // KEYS * KEYS
        for done in range(0, length + KEYS, KEYS):
            start = last - done
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, 2 * KEYS * BYTES)
            at = [sequence, start, head * HEAD]
            tma.async_copy_global_to_shared(key, at, ready, key_ring.index(stage))
            at = [sequence, start + KEYS, head * HEAD]
            if BITS == 8:  # values lie transposed
                at = [sequence, head * HEAD, start + KEYS]
            tma.async_copy_global_to_shared(values, at, ready, value_ring.index(stage))
            stage, phase = ring_advance(stage, phase, STAGES)


@gluon.jit
def _score(queries, key_ring, stage):
    """Start the product of a block of queries with a tile of keys."""
    KEYS: gl.constexpr = key_ring.shape[2]
    BITS: gl.constexpr = key_ring.dtype.primitive_bitwidth
    nothing = gl.zeros([ROWS, KEYS], gl.float32, layout=layout_of(KEYS, BITS))
    keys = key_ring.index(stage).reshape([KEYS, HEAD]).permute((1, 0))
    return warpgroup_mma(queries.reshape([ROWS, HEAD]), keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _beside_rows(factor, COLUMNS: gl.constexpr, BITS: gl.constexpr):
    """A number of each row as a column beside a product of so many columns."""
    return gl.convert_layout(factor, gl.SliceLayout(1, layout_of(COLUMNS, BITS)), True)[:, None]


@gluon.jit
def _leave(attended, total, out, buffer, at, BITS: gl.constexpr):
    """Divide by the sums of the weights, and store."""
    buffer.reshape([ROWS, HEAD]).store((attended * (1.0 / _beside_rows(total, HEAD, BITS))).to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, at, buffer)
