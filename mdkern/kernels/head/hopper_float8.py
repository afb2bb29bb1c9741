"""A weight in float8 as an operand of Hopper's tensor cores in 16 bits, in Gluon: every float8_e4m3fn is a bfloat16.

Lanes read four neighbouring bytes of a row, while the operand wants each lane to hold two and two. A product does not
depend on the order of its inner dimension, so no value moves: in every 16 columns, the four bytes of lane t, 4 t + 2 u
+ j, are taken for the operand's columns 8 u + 2 t + j, and `operand_order` puts the other operand into this order.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mdkern.kernels.gluon_common import ring_advance
from mdkern.kernels.head.hopper_position import item_position

# The compiler's own conversion to bfloat16 takes an instruction of a sixteenth of the others' speed for each value.
TO_BFLOAT16 = gl.constexpr("""{
.reg .b16 low, high, x<4>;
.reg .b32 p, q;
.reg .f32 f<4>;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 p, low;
cvt.rn.f16x2.e4m3x2 q, high;
mov.b32 {x0, x1}, p;
mov.b32 {x2, x3}, q;
cvt.f32.f16 f0, x0;
cvt.f32.f16 f1, x1;
cvt.f32.f16 f2, x2;
cvt.f32.f16 f3, x3;
cvt.rn.bf16x2.f32 $0, f1, f0;
cvt.rn.bf16x2.f32 $1, f3, f2;
}""")


@constexpr_function
def _four_bytes(columns):
    """The layout in which each lane has four neighbouring bytes of rows of ``[64, columns]``, in groups of 16."""
    doubled = [16]
    while 2 * doubled[-1] < columns:
        doubled.append(2 * doubled[-1])
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *([0, column] for column in doubled)],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, columns],
    )


@gluon.jit
def convert(x, dtype: gl.constexpr):
    """float8_e4m3fn to bfloat16 or float16, exactly. Four neighbours of a lane must be neighbours in its registers."""
    if dtype == gl.bfloat16:
        converted = gl.inline_asm_elementwise(TO_BFLOAT16, "=r,=r,r", [x], gl.bfloat16, True, 4)
    else:
        converted = x.to(dtype)
    return converted


@gluon.jit
def convert_tiles(
    rings,
    work,
    K_TILES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    FIXED: gl.constexpr,
    TURN: gl.constexpr,  # number of the converter
    CONVERTERS: gl.constexpr,
):
    """Converter warps of `hopper_projection`: take tiles in float8 to another ring, in 16 bits, in turn.

    The raw ring has a multiple of `CONVERTERS` stages, so that each of them belongs to one converter.
    """
    raw_ring, raw_full, raw_empty, ring, full, empty = rings
    BK: gl.constexpr = raw_ring.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // BK, BK // 16], [4, 1], [1, 0])
    program, items, schedule = work
    raw_stage = program * 0
    raw_phase = program * 0
    stage = program * 0
    phase = program * 0
    for item in range(items):
        _, first, last, stride, _ = item_position(item, program, schedule, PROGRAMS, FIXED)
        for _ in range(first, last, stride):
            for _ in range(K_TILES):
                if raw_stage % CONVERTERS == TURN:
                    mbarrier.wait(raw_full.index(raw_stage), raw_phase)
                    x = convert(raw_ring.index(raw_stage).load(layout), ring.dtype)
                    mbarrier.wait(empty.index(stage), phase ^ 1)
                    ring.index(stage).store(x)
                    fence_async_shared()
                    mbarrier.arrive(full.index(stage))
                    mbarrier.arrive(raw_empty.index(raw_stage))
                raw_stage, raw_phase = ring_advance(raw_stage, raw_phase, raw_ring.shape[0])
                stage, phase = ring_advance(stage, phase, ring.shape[0])


@gluon.jit
def operand_order(x):
    """The columns of ``[R, C]`` in the order in which `load_operand` has those of a weight."""
    return x.reshape(x.shape[0], x.shape[1] // 16, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(x.shape[0], x.shape[1])


@gluon.jit
def load_operand(tile, dtype: gl.constexpr, layout: gl.constexpr):
    """A tile ``[64, C]`` of float8 in shared memory as a tensor core's left operand in registers, of `dtype`, whose
    result has `layout`."""
    x = convert(tile.load(_four_bytes(tile.shape[1])), dtype)
    return gl.convert_layout(operand_order(x), gl.DotOperandLayout(0, layout, 2), True)


@gluon.jit
def reorder_rows(hidden_tiles):
    """Put the columns of the rows in shared memory into the order of a weight in float8."""
    BK: gl.constexpr = hidden_tiles.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // BK, BK // 16], [4, 1], [1, 0])
    for k in range(hidden_tiles.shape[0]):
        hidden_tiles.index(k).store(operand_order(hidden_tiles.index(k).load(layout)))


@gluon.jit
def product_of_float8(
    rings, stage, phase, layout: gl.constexpr, TURN: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """`hopper_skinny._product` for a weight in float8, which goes through registers; the result has `layout`.

    A tile is given back when its product has begun. Then its values have been used, and so have arrived in registers.
    """
    hidden_tiles, weight_ring, full, empty = rings[:4]
    IDS: gl.constexpr = weight_ring.shape[1]
    ROWS: gl.constexpr = hidden_tiles.shape[1]
    K_TILES: gl.constexpr = hidden_tiles.shape[0]
    STAGES: gl.constexpr = weight_ring.shape[0] // CONSUMERS
    x = gl.zeros([IDS, ROWS], gl.float32, layout=layout)
    slot = stage * CONSUMERS + TURN
    mbarrier.wait(full.index(slot), phase)
    w = load_operand(weight_ring.index(slot), hidden_tiles.dtype, layout)
    for k in range(K_TILES - 1):
        x = warpgroup_mma(w, hidden_tiles.index(k).permute((1, 0)), x, use_acc=k > 0, is_async=True)
        mbarrier.arrive(empty.index(slot))
        stage, phase = ring_advance(stage, phase, STAGES)
        slot = stage * CONSUMERS + TURN
        mbarrier.wait(full.index(slot), phase)
        next_w = load_operand(weight_ring.index(slot), hidden_tiles.dtype, layout)
        x, w = warpgroup_mma_wait(0, deps=(x, w))
        w = next_w
    x = warpgroup_mma(w, hidden_tiles.index(K_TILES - 1).permute((1, 0)), x, use_acc=K_TILES > 1, is_async=True)
    mbarrier.arrive(empty.index(slot))
    stage, phase = ring_advance(stage, phase, STAGES)
    x, w = warpgroup_mma_wait(0, deps=(x, w))
    return x, stage, phase
