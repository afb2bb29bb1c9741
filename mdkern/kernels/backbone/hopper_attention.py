"""`mdkern.kernels.backbone.attention` for many sequences on Hopper, in Gluon: softmax in one pass over the keys.

`hopper_attention_tile` says who does what. A consumer warpgroup starts the scores of the next keys together with the
product with the present values. There are four of them, which are not kept in step, so that one's exponentials, and the
end of its tile, lie beside the others' products (FlashAttention-3, 2407.08608).

A row's weights are powers of two less an anchor, which stays while no score exceeds it by more than `GROWTH`, so that
what was added up is seldom rescaled.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mdkern.kernels.backbone.attention import GROUPS as _GROUPS
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
from mdkern.kernels.backbone.hopper_tile import ROWS, _halves
from mdkern.kernels.gluon_common import ring_advance
from mdkern.kernels.triton_common import LOG2E

GROUPS = gl.constexpr(_GROUPS)
BITS = gl.constexpr(16)
GROWTH = gl.constexpr(8)  # weights are at most 2 to this
SCALE = gl.constexpr(LOG2E.value / 8)  # of scores: 1 / sqrt(64), for powers of two


def _rescaling() -> str:
    """PTX that multiplies a thread's 32 numbers, of two rows, by factors, unless those are 1 in its whole warp."""
    lines = ["{", ".reg .pred p, q;", "setp.neu.f32 p, $64, 0f3F800000;", "setp.neu.or.f32 p, $66, 0f3F800000, p;"]
    lines += ["vote.sync.any.pred q, p, 0xffffffff;"] + [f"mov.f32 ${n}, ${n + 32};" for n in range(32)]
    lines += ["@!q bra DONE;"] + [f"mul.f32 ${n}, ${n}, ${n + 64};" for n in range(32)]
    return "\n".join([*lines, "DONE:", "}"])


RESCALING = gl.constexpr(_rescaling())
RESCALING_CONSTRAINTS = gl.constexpr(",".join(["=&f"] * 32 + ["f"] * 64))


@gluon.jit
def _fold(x):
    """Add up what a thread holds of a row, but for two neighbours: ``[64, C]`` to ``[64, 8]``."""
    for _ in gl.static_range(5):
        if x.shape[1] > 8:
            left, right = _halves(x, layout_of(x.shape[1] // 2, BITS))
            x = left + right
    return x


@gluon.jit
def _soften(scores, anchor, total):
    """Scores as weights; the new anchors; sums of all weights by thread; the factors of what was added up before."""
    peak = gl.max(scores, 1) * SCALE
    reached = gl.where(peak > anchor + GROWTH, peak, anchor)
    factor = gl.exp2(anchor - reached)
    weights = gl.exp2(scores * SCALE - reached[:, None])
    return weights, reached, total * _beside_rows(factor, 8, BITS) + _fold(weights), factor


@gluon.jit
def _as_left(weights, DTYPE: gl.constexpr):
    """Weights as a product's left operand, for which they stay in their registers."""
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, layout_of(HEAD, BITS), 2), True)


@gluon.jit
def _rescale(attended, factor):
    """Multiply rows by factors, most of which are 1."""
    beside = _beside_rows(factor, HEAD, BITS)
    return gl.inline_asm_elementwise(
        RESCALING, RESCALING_CONSTRAINTS, [attended, beside], dtype=gl.float32, is_pure=True, pack=32
    )


@gluon.jit
def _add(weights, value_ring, stage, attended):
    """Start to add up a tile of values by their weights."""
    values = value_ring.index(stage).reshape([value_ring.shape[2], HEAD])
    return warpgroup_mma(weights, values, attended, is_async=True)


@gluon.jit
def _consume(
    out,
    rings,
    barriers,
    sizes,
    GROUP: gl.constexpr,  # number of the warpgroup
    HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    MASKED: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """A consumer warpgroup: attention of 64 queries of each tile.

    What products add up must not be touched between the start of any product and its wait: the compiler would then let
    none of them run beside anything.
    """
    held, key_ring, value_ring, leaving = rings
    held_full, held_empty, full, empty = barriers
    tiles, _, length = sizes
    KEYS: gl.constexpr = key_ring.shape[2]
    DTYPE: gl.constexpr = value_ring.dtype
    stage = gl.program_id(0) * 0
    phase = stage + 0
    place = stage + 0
    turn = stage + 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        row, sequence, head = _place(tile, sizes, GROUPS, HEADS)
        anchor = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, layout_of(KEYS, BITS)))
        total = gl.zeros([ROWS, 8], gl.float32, layout=layout_of(8, BITS))
        attended = gl.zeros([ROWS, HEAD], gl.float32, layout=layout_of(HEAD, BITS))
        queries = held.index(place * GROUPS + GROUP)
        mbarrier.wait(held_full.index(place), turn)
        mbarrier.wait(full.index(stage), phase)
        scores = warpgroup_mma_wait(0, deps=(_score(queries, key_ring, stage),))
        mbarrier.arrive(empty.index(stage))
        stage, phase = ring_advance(stage, phase, STAGES)
        if MASKED:  # The last keys come first. They are counted from the row, or else they would be kept in registers.
            key = row + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout_of(KEYS, BITS)))
            scores = gl.where((key < row + length % KEYS)[None, :], scores, float("-inf"))
        weights, anchor, total, _factor = _soften(scores, anchor, total)
        left = _as_left(weights, DTYPE)
        for _done in range(KEYS, length, KEYS):
            mbarrier.wait(full.index(stage), phase)
            scores = _score(queries, key_ring, stage)
            attended = _add(left, value_ring, stage, attended)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            weights, anchor, total, factor = _soften(scores, anchor, total)
            attended = _rescale(warpgroup_mma_wait(0, deps=(attended,)), factor)
            mbarrier.arrive(empty.index(stage))
            stage, phase = ring_advance(stage, phase, STAGES)
            left = _as_left(weights, DTYPE)
        mbarrier.arrive(held_empty.index(place))
        mbarrier.wait(full.index(stage), phase)
        attended = warpgroup_mma_wait(0, deps=(_add(left, value_ring, stage, attended),))
        mbarrier.arrive(empty.index(stage))
        tma.store_wait(0)  # the last tile's store has read its buffer
        at = [sequence, row + ROWS * GROUP, head * HEAD]
        _leave(attended, gl.sum(total, 1), out, leaving.index(GROUP), at, BITS)
        stage, phase = ring_advance(stage, phase, STAGES)
        place, turn = ring_advance(place, turn, AHEAD)
    tma.store_wait(0)


# These arguments are not specialised, so that new lengths and batch sizes compile nothing.
COUNTS = ("tiles", "row_tiles", "length")


@gluon.jit(do_not_specialize=COUNTS)
def attention_kernel(
    query,  # descriptor of [B, L, H * HEAD], in steps of ROWS
    key,  # descriptors of the same in steps of KEYS
    values,
    out,  # descriptor of [B, L, H * HEAD], in steps of ROWS
    tiles,
    row_tiles,
    length,
    HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    MASKED: gl.constexpr,  # whether L is no multiple of KEYS
    PROGRAMS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    KEYS: gl.constexpr = key.block_shape[1]
    held = gl.allocate_shared_memory(query.dtype, [AHEAD * GROUPS, 1, ROWS, HEAD], query.layout)
    key_ring = gl.allocate_shared_memory(key.dtype, [STAGES, 1, KEYS, HEAD], key.layout)
    value_ring = gl.allocate_shared_memory(values.dtype, [STAGES, 1, KEYS, HEAD], values.layout)
    leaving = gl.allocate_shared_memory(out.dtype, [GROUPS, 1, ROWS, HEAD], out.layout)
    # A constexpr that is put into a variable is no longer one, so each call spells its constant arguments out.
    barriers = _barriers(GROUPS, STAGES, AHEAD)
    inputs = (query, key, values)
    copied = (held, key_ring, value_ring)
    rings = (held, key_ring, value_ring, leaving)
    sizes = (tiles, row_tiles, length)
    gl.warp_specialize(
        [
            (_consume, (out, rings, barriers, sizes, 0, HEADS, STAGES, AHEAD, MASKED, PROGRAMS)),
            (_consume, (out, rings, barriers, sizes, 1, HEADS, STAGES, AHEAD, MASKED, PROGRAMS)),
            (_consume, (out, rings, barriers, sizes, 2, HEADS, STAGES, AHEAD, MASKED, PROGRAMS)),
            (_consume, (out, rings, barriers, sizes, 3, HEADS, STAGES, AHEAD, MASKED, PROGRAMS)),
            (_produce, (inputs, copied, barriers, sizes, GROUPS, HEADS, STAGES, AHEAD, PROGRAMS)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, 24],
    )
