"""`mdkern.kernels.linear` for Hopper in Gluon: products whose epilogues do what would otherwise be a pass over memory.

A persistent program per processor: one warp copies tiles into a ring in shared memory, running ahead over the ends of
output tiles; two warpgroups multiply 64 rows each and finish their rows in registers. The finished tile leaves from a
buffer of its own while the next one is multiplied; with a residual, the stream's tile comes in through that buffer.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005, SIM102

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS = gl.constexpr(64)  # of a warpgroup
PART = gl.constexpr(64)  # columns that are finished at a time: 128 bytes, the width of the shared-memory swizzle
WARPGROUPS = gl.constexpr(2)

# 64 and 32 columns as the tensor cores leave them.
WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
THIN = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16]))


@gluon.jit
def _halves(x):
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@gluon.jit
def _beside(left, right):
    """Undoes `_halves`."""
    return gl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@gluon.jit
def _parts(x):
    """``[64, 256]`` as a tuple of ``[64, 64]``: no register moves."""
    left, right = _halves(x)
    a, b = _halves(left)
    c, d = _halves(right)
    return (
        gl.convert_layout(a, WIDE, True),
        gl.convert_layout(b, WIDE, True),
        gl.convert_layout(c, WIDE, True),
        gl.convert_layout(d, WIDE, True),
    )


@gluon.jit
def _gelu_of_twice(h):
    """``gelu(2 h)``, tanh form: five operations and a hyperbolic tangent accurate to 2^-11."""
    inner = h * (1.5957691216057308 + 0.28541926508900104 * (h * h))
    t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=gl.float32, is_pure=True, pack=1)
    return h * t + h


@gluon.jit
def _turn(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@gluon.jit
def _corner(tile, row_tiles, column_tiles, BN: gl.constexpr, GROUP: gl.constexpr):
    """Top left of a tile: `GROUP` row tiles by all columns at a time, so that the second operand stays in the cache."""
    first = tile // (GROUP * column_tiles) * GROUP
    rows = gl.minimum(row_tiles - first, GROUP)
    rest = tile % (GROUP * column_tiles)
    return (first + rest % rows) * (ROWS * WARPGROUPS), rest // rows * BN


@gluon.jit
def _copy(
    left,
    right,
    stream,
    rings,
    sizes,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """The copying warp."""
    left_ring, right_ring, leaving, full, empty, stream_full, stream_empty = rings
    row_tiles, column_tiles, steps = sizes
    BM: gl.constexpr = ROWS * WARPGROUPS
    PARTS: gl.constexpr = BN // PART
    program = gl.program_id(0)
    stage = program * 0
    phase = stage + 1
    stream_phase = stage + 1
    for tile in range(program, row_tiles * column_tiles, PROGRAMS):
        row, column = _corner(tile, row_tiles, column_tiles, BN, GROUP)
        for k in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (BM + BN) * BK * 2)
            tma.async_copy_global_to_shared(right, [column, k * BK], ready, right_ring.index(stage))
            tma.async_copy_global_to_shared(left, [row, k * BK], ready, left_ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = stage * 0
                phase ^= 1
            if stream is not None:
                if k == steps // 2:
                    for half in gl.static_range(WARPGROUPS):
                        mbarrier.wait(stream_empty.index(half), stream_phase)
                        mbarrier.expect(stream_full.index(half), ROWS * BN * 2)
                        for part in gl.static_range(PARTS):
                            at = [row + ROWS * half, column + PART * part]
                            buffer = leaving.index(half * PARTS + part)
                            tma.async_copy_global_to_shared(stream, at, stream_full.index(half), buffer)
        stream_phase ^= 1


@gluon.jit
def _multiply(
    out,
    stream,
    tables,
    rings,
    sizes,
    places,
    HALF: gl.constexpr,  # which 64 of the tile's rows
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    GELU: gl.constexpr,
    PAIRS: gl.constexpr,  # head_dim / 2
):
    """A multiplying warpgroup."""
    bias, gate, cos, sin = tables
    left_ring, right_ring, leaving, full, empty, stream_full, stream_empty = rings
    row_tiles, column_tiles, steps = sizes
    length, turned, rows_of_sequence, last_sequence, gate_stride = places
    PARTS: gl.constexpr = BN // PART
    product_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    pair_layout: gl.constexpr = THIN if PAIRS == 32 else WIDE
    program = gl.program_id(0)
    stage = program * 0
    phase = program * 0
    stream_phase = program * 0
    for tile in range(program, row_tiles * column_tiles, PROGRAMS):
        row, column = _corner(tile, row_tiles, column_tiles, BN, GROUP)
        row += HALF * ROWS
        # What the end of the tile needs is fetched at its start: later it would be waited for.
        within = gl.arange(0, PART, layout=gl.SliceLayout(0, WIDE))
        shifts = ()
        factors = ()
        for part in gl.static_range(PARTS):
            at = gl.multiple_of(column + PART * part, PART) + within
            if bias is not None:
                shifts = shifts + (gl.load(bias + at),)
            if gate is not None:
                sequence = gl.minimum(
                    row // rows_of_sequence, last_sequence
                )  # the last tile's rows may be past the end
                factors = factors + (gl.load(gate + sequence * gate_stride + at),)
        if cos is not None:
            position = (row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, pair_layout))) % length
            angle = position[:, None] * PAIRS + gl.arange(0, PAIRS, layout=gl.SliceLayout(0, pair_layout))[None, :]
            c, s = gl.load(cos + angle), gl.load(sin + angle)
        product = gl.zeros([ROWS, BN], gl.float32, layout=product_layout)
        previous = stage + 0  # a copy: `stage` itself would pass for a value that the loop leaves alone
        for k in range(steps):
            mbarrier.wait(full.index(stage), phase)
            ours = left_ring.index(stage).slice(HALF * ROWS, ROWS, dim=0)
            product = warpgroup_mma(
                ours, right_ring.index(stage).permute((1, 0)), product, use_acc=k > 0, is_async=True
            )
            if stream is not None:
                if k == 0:  # the last tile has left the buffer by now
                    tma.store_wait(0)
                    mbarrier.arrive(stream_empty.index(HALF), pred=tile != program)
            product = warpgroup_mma_wait(1, deps=(product,))
            mbarrier.arrive(empty.index(previous), pred=k > 0)
            previous = stage + 0
            stage += 1
            if stage == STAGES:
                stage = stage * 0
                phase ^= 1

        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index(previous))

        parts = _parts(product)
        if stream is not None:
            mbarrier.wait(stream_full.index(HALF), stream_phase)
            stream_phase ^= 1
        else:
            tma.store_wait(0)
        for two in gl.static_range(PARTS // 2):
            first, second = parts[2 * two], parts[2 * two + 1]
            near, far = leaving.index(HALF * PARTS + 2 * two), leaving.index(HALF * PARTS + 2 * two + 1)
            if GELU:
                first = _gelu_of_twice(first * 0.5 + (shifts[2 * two].to(gl.float32) * 0.5)[None, :])
                second = _gelu_of_twice(second * 0.5 + (shifts[2 * two + 1].to(gl.float32) * 0.5)[None, :])
            elif bias is not None:
                first += shifts[2 * two].to(gl.float32)[None, :]
                second += shifts[2 * two + 1].to(gl.float32)[None, :]
            if gate is not None:
                first = first * factors[2 * two].to(gl.float32)[None, :]
                second = second * factors[2 * two + 1].to(gl.float32)[None, :]
            if stream is not None:
                held = near.load(WIDE), far.load(WIDE)
                first += held[0].to(gl.float32)
                second += held[1].to(gl.float32)
            if cos is not None:
                if column + 2 * PART * two < turned:
                    if PAIRS == 64:
                        first, second = _turn(first, second, c, s)
                    else:
                        a, b = _halves(first)
                        a, b = _turn(gl.convert_layout(a, THIN, True), gl.convert_layout(b, THIN, True), c, s)
                        first = gl.convert_layout(_beside(a, b), WIDE, True)
                        a, b = _halves(second)
                        a, b = _turn(gl.convert_layout(a, THIN, True), gl.convert_layout(b, THIN, True), c, s)
                        second = gl.convert_layout(_beside(a, b), WIDE, True)
            near.store(first.to(out.dtype))
            far.store(second.to(out.dtype))
        fence_async_shared()
        for part in gl.static_range(PARTS):
            tma.async_copy_shared_to_global(out, [row, column + PART * part], leaving.index(HALF * PARTS + part))
    tma.store_wait(0)


# Not specialised, so that no length or batch size is compiled anew.
COUNTS = ("row_tiles", "column_tiles", "steps", "length", "turned", "rows_of_sequence", "last_sequence")


@gluon.jit(do_not_specialize=COUNTS)
def _linear(
    left,  # descriptor of [M, K]
    right,  # descriptor of [N, K]
    out,  # descriptor of [M, N]
    stream,  # descriptor of [M, N], what is added to
    bias,
    gate,
    cos,
    sin,
    row_tiles,
    column_tiles,
    steps,
    length,
    turned,
    rows_of_sequence,
    last_sequence,
    gate_stride,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    GELU: gl.constexpr,
    PAIRS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    BM: gl.constexpr = ROWS * WARPGROUPS
    left_ring = gl.allocate_shared_memory(left.dtype, [STAGES, BM, BK], left.layout)
    right_ring = gl.allocate_shared_memory(right.dtype, [STAGES, BN, BK], right.layout)
    leaving = gl.allocate_shared_memory(out.dtype, [WARPGROUPS * (BN // PART), ROWS, PART], out.layout)
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
    # Constants lose their constancy in a variable, so the constant arguments are spelt out in each call.
    rings = (left_ring, right_ring, leaving, full, empty, stream_full, stream_empty)
    sizes = (row_tiles, column_tiles, steps)
    places = (length, turned, rows_of_sequence, last_sequence, gate_stride)
    tables = (bias, gate, cos, sin)
    gl.warp_specialize(
        [
            (_multiply, (out, stream, tables, rings, sizes, places, 0, BN, STAGES, GROUP, PROGRAMS, GELU, PAIRS)),
            (_multiply, (out, stream, tables, rings, sizes, places, 1, BN, STAGES, GROUP, PROGRAMS, GELU, PAIRS)),
            (_copy, (left, right, stream, rings, sizes, BN, BK, STAGES, GROUP, PROGRAMS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@dataclass(frozen=True)
class Cut:
    """How the work is cut."""

    columns: int = 256
    depth: int = 64
    stages: int = 3
    group: int = 16


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stream: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    length: int = 1,
    turned: int = 0,
    gelu: bool = False,
    cut: Cut = Cut(),
) -> None:
    """``out = [stream +] [gate *] [gelu] (x @ weight.T + bias)``, the first `turned` columns turned by `cos`, `sin`."""
    rows, depth = x.shape
    columns = weight.shape[0]
    element = ELEMENT[x.dtype]

    def describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, block, gl.NVMMASharedLayout.get_default_for(block, element))

    row_tiles, column_tiles = triton.cdiv(rows, 128), triton.cdiv(columns, cut.columns)
    programs = min(processors(x.device), row_tiles * column_tiles)
    sequences = gate.shape[0] if gate is not None and gate.ndim == 2 else 1
    _linear[(programs,)](
        describe(x, [128, cut.depth]),
        describe(weight, [cut.columns, cut.depth]),
        describe(out, [64, 64]),
        None if stream is None else describe(stream, [64, 64]),
        bias,
        gate,
        cos,
        sin,
        row_tiles,
        column_tiles,
        triton.cdiv(depth, cut.depth),
        length,
        turned,
        rows // sequences,
        sequences - 1,
        gate.stride(0) if sequences > 1 else 0,
        BN=cut.columns,
        BK=cut.depth,
        STAGES=cut.stages,
        GROUP=cut.group,
        PROGRAMS=programs,
        GELU=gelu,
        PAIRS=0 if cos is None else cos.shape[1],
        REGISTERS=240,
        num_warps=4,
        maxnreg=168,
    )


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
