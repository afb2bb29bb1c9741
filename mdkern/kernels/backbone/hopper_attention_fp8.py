"""`mdkern.kernels.backbone.attention_fp8` for Hopper, in Gluon: softmax in one pass over the keys (2307.08691).

A producer warp copies queries, keys and values into shared memory. Two consumer warpgroups have 64 queries each: while
one turns scores into weights, the tensor cores work for the other (FlashAttention-3, 2407.08608).

Weights need no exponential, see `attention_fp8.weights_of`: an exponent is scaled, limited and rounded, and its low
byte packed. The sums of weights are a product with ones. A row's maximum is rounded up to a whole number, so that a new
one changes what was added up by a power of two, and the order of the keys changes nothing.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mdkern.kernels.backbone import attention_fp8
from mdkern.kernels.backbone.hopper_attention_tile import (
    HEAD,
    _barriers,
    _beside_rows,
    _leave,
    _place,
    _produce,
    _score,
    layout_of,
)
from mdkern.kernels.backbone.hopper_tile import ROWS, WARPGROUPS, _halves
from mdkern.kernels.gluon_common import ring_advance

BITS = gl.constexpr(8)
COPIES = gl.constexpr(8)  # equal columns of the sums of weights: the fewest that a product has
ONE = gl.constexpr(56)  # the code of 1
OF_ONE = gl.constexpr(8 * (attention_fp8.LIFT + 7) / 128)  # the code, over 128, of a weight at the maximum

# Codes over 128, of two weights, to codes: rounded by an addition to 1.5 * 2^23, whose low byte is 0.
TO_CODES = gl.constexpr("""{
.reg .f32 first, second;
.reg .b32 low, high, both;
fma.rn.f32 first, $1, 0f43000000, 0f4B400000;
fma.rn.f32 second, $2, 0f43000000, 0f4B400000;
mov.b32 low, first;
mov.b32 high, second;
prmt.b32 both, low, high, 0x0040;
cvt.u16.u32 $0, both;
}""")


@gluon.jit
def _weigh(weights, rings, stage):
    """Start the products of a tile's weights with its values, and with ones.

    Tensor cores drop what is 2^-13 of a sum and less where factors are in e4m3, so that tiles are added up outside.
    """
    _, _, value_ring, ones, _ = rings
    values = value_ring.index(stage).reshape([HEAD, value_ring.shape[3]])
    nothing = gl.zeros([ROWS, HEAD], gl.float32, layout=layout_of(HEAD, BITS))
    left = gl.convert_layout(weights, gl.DotOperandLayout(0, layout_of(HEAD, BITS), 4), True)
    weighted = warpgroup_mma(left, values.permute((1, 0)), nothing, use_acc=False, is_async=True)
    nothing = gl.zeros([ROWS, COPIES], gl.float32, layout=layout_of(COPIES, BITS))
    left = gl.convert_layout(weights, gl.DotOperandLayout(0, layout_of(COPIES, BITS), 4), True)
    return weighted, warpgroup_mma(left, ones.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _add(x, tile, factor):
    """Multiply what was added up by a factor of each row, and add a tile's."""
    return x * _beside_rows(factor, x.shape[1], BITS) + tile


@gluon.jit
def _highest(x):
    """The maximum of each row, by a tree, whose branches do not wait for each other."""
    KEYS: gl.constexpr = x.shape[1]
    for _ in gl.static_range(4):
        if x.shape[1] > 8:
            left, right = _halves(x, layout_of(x.shape[1] // 2, BITS))
            x = gl.maximum(left, right)
    return gl.convert_layout(gl.max(x, 1), gl.SliceLayout(1, layout_of(KEYS, BITS)), True)


@gluon.jit
def _soften(scores, top, scale):
    """Scores as weights in e4m3, the columns as a left operand's registers take them; the new maxima; the factors of
    what was added up before."""
    C: gl.constexpr = scores.shape[1]
    peak = gl.maximum(top, gl.ceil(_highest(scores) * scale))
    codes = gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [scores, scale / 16, (OF_ONE - peak / 16)[:, None]],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    codes = codes.reshape(ROWS, C // 32, 2, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).reshape(ROWS, C)
    packed = gl.inline_asm_elementwise(TO_CODES, "=h,f,f", [codes], dtype=gl.int8, is_pure=True, pack=2)
    return packed.to(gl.float8e4nv, bitcast=True), peak, gl.exp2(top - peak)


@gluon.jit
def _consume(
    out,
    scale,
    rings,
    barriers,
    sizes,
    GROUP: gl.constexpr,  # number of the warpgroup
    HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """A consumer warpgroup: attention of 64 queries of each tile.

    The next keys' scores are computed together with the product with the present values, and both waited for.
    """
    held, key_ring, _, _, leaving = rings
    held_full, held_empty, full, empty = barriers
    tiles, _, length = sizes
    KEYS: gl.constexpr = key_ring.shape[2]
    stage = gl.program_id(0) * 0
    phase = stage + 0
    place = stage + 0
    turn = stage + 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        row, sequence, head = _place(tile, sizes, WARPGROUPS, HEADS)
        sharpness = gl.load(scale + head)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, layout_of(KEYS, BITS)))
        attended = gl.zeros([ROWS, HEAD], gl.float32, layout=layout_of(HEAD, BITS))
        total = gl.zeros([ROWS, COPIES], gl.float32, layout=layout_of(COPIES, BITS))
        queries = held.index(place * WARPGROUPS + GROUP)
        mbarrier.wait(held_full.index(place), turn)
        mbarrier.wait(full.index(stage), phase)
        scores = warpgroup_mma_wait(0, deps=(_score(queries, key_ring, stage),))
        mbarrier.arrive(empty.index(stage))
        stage, phase = ring_advance(stage, phase, STAGES)
        for _start in range(KEYS, length, KEYS):
            weights, top, factor = _soften(scores, top, sharpness)
            mbarrier.wait(full.index(stage), phase)
            weighted, sums = _weigh(weights, rings, stage)
            scores = _score(queries, key_ring, stage)
            scores, weighted, sums = warpgroup_mma_wait(0, deps=(scores, weighted, sums))
            mbarrier.arrive(empty.index(stage))
            stage, phase = ring_advance(stage, phase, STAGES)
            attended, total = _add(attended, weighted, factor), _add(total, sums, factor)
        mbarrier.arrive(held_empty.index(place))
        weights, top, factor = _soften(scores, top, sharpness)
        mbarrier.wait(full.index(stage), phase)
        weighted, sums = warpgroup_mma_wait(0, deps=_weigh(weights, rings, stage))
        mbarrier.arrive(empty.index(stage))
        attended, total = _add(attended, weighted, factor), _add(total, sums, factor)
        tma.store_wait(0)  # the last tile's store has read its buffer
        at = [sequence, row + ROWS * GROUP, head * HEAD]
        _leave(attended, gl.max(total, 1), out, leaving.index(GROUP), at, BITS)
        stage, phase = ring_advance(stage, phase, STAGES)
        place, turn = ring_advance(place, turn, AHEAD)
    tma.store_wait(0)


# These arguments are not specialised, so that new lengths and batch sizes compile nothing.
COUNTS = ("tiles", "row_tiles", "length")


@gluon.jit(do_not_specialize=COUNTS)
def attention_fp8_kernel(
    query,  # descriptor of [B, L, H * HEAD], in steps of ROWS
    key,  # the same in steps of KEYS
    values,  # descriptor of [B, H * HEAD, L]
    out,  # descriptor of [B, L, H * HEAD]
    scale,  # [H]
    tiles,
    row_tiles,
    length,
    HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    PROGRAMS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    KEYS: gl.constexpr = key.block_shape[1]
    held = gl.allocate_shared_memory(query.dtype, [AHEAD * WARPGROUPS, 1, ROWS, HEAD], query.layout)
    key_ring = gl.allocate_shared_memory(key.dtype, [STAGES, 1, KEYS, HEAD], key.layout)
    value_ring = gl.allocate_shared_memory(values.dtype, [STAGES, 1, HEAD, KEYS], values.layout)
    leaving = gl.allocate_shared_memory(out.dtype, [WARPGROUPS, 1, ROWS, HEAD], out.layout)
    ones = gl.allocate_shared_memory(
        query.dtype, [COPIES, KEYS], gl.NVMMASharedLayout.get_default_for([COPIES, KEYS], query.dtype)
    )
    plain: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    ones.store(gl.full([COPIES, KEYS], ONE, gl.int8, layout=plain).to(query.dtype, bitcast=True))
    # A constexpr that is put into a variable is no longer one, so each call spells its constant arguments out.
    copied = (held, key_ring, value_ring)
    rings = (held, key_ring, value_ring, ones, leaving)
    barriers = _barriers(WARPGROUPS, STAGES, AHEAD)
    sizes = (tiles, row_tiles, length)
    inputs = (query, key, values)
    gl.warp_specialize(
        [
            (_consume, (out, scale, rings, barriers, sizes, 0, HEADS, STAGES, AHEAD, PROGRAMS)),
            (_consume, (out, scale, rings, barriers, sizes, 1, HEADS, STAGES, AHEAD, PROGRAMS)),
            (_produce, (inputs, copied, barriers, sizes, WARPGROUPS, HEADS, STAGES, AHEAD, PROGRAMS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
