"""`mdkern.kernels.linear` for Hopper in Gluon: products whose epilogues do what would otherwise be a pass over memory.

A persistent program per processor: one warp copies tiles into a ring in shared memory, running ahead over the ends of
output tiles; two warpgroups multiply 64 rows each and finish their rows in registers. The finished tile leaves from a
buffer of its own while the next one is multiplied; with a residual, the stream's tile comes in through that buffer.
Layer normalisation goes along: a residual's epilogue sums up the rows that it holds, and the next product's divides by
their spread (`mdkern.kernels.folded_norm`).
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005, SIM102

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mdkern.kernels.modulated_norm import EPS as NORM_EPS

ROWS = gl.constexpr(64)  # of a warpgroup
PART = gl.constexpr(64)  # columns that are finished at a time: 128 bytes, the width of the shared-memory swizzle
WARPGROUPS = gl.constexpr(2)
SPAN = gl.constexpr(256)  # columns that a row's sums are of
EPS = gl.constexpr(NORM_EPS)

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
def _load_sums(sums, row, rows, SPANS: gl.constexpr):
    """Sums and sums of squares of 64 rows' spans of columns."""
    at = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    loaded = ()
    for number in gl.static_range(2 * SPANS):
        loaded = loaded + (gl.load(sums + number * rows + at, mask=at < rows, other=0.0),)
    return loaded


@gluon.jit
def _one_over_spread(loaded, SPANS: gl.constexpr):
    total, squares = loaded[0], loaded[1]
    for span in gl.static_range(1, SPANS):
        total += loaded[2 * span]
        squares += loaded[2 * span + 1]
    mean = total / (SPANS * SPAN)
    variance = squares / (SPANS * SPAN) - mean * mean
    return gl.rsqrt(gl.maximum(variance, 0.0) + EPS)


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
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    GELU: gl.constexpr,
    PAIRS: gl.constexpr,  # head_dim / 2
    SPANS: gl.constexpr,  # of a row of the left matrix, with sums
):
    """A multiplying warpgroup."""
    bias, gate, cos, sin, left_sums, out_sums = tables
    left_ring, right_ring, leaving, full, empty, stream_full, stream_empty = rings
    row_tiles, column_tiles, steps = sizes
    rows, length, turned, rows_of_sequence, last_sequence, gate_stride = places
    PARTS: gl.constexpr = BN // PART
    STAGES: gl.constexpr = left_ring.shape[0]
    BUFFERS: gl.constexpr = leaving.shape[0] // WARPGROUPS
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
        if left_sums is not None:
            loaded = _load_sums(left_sums, row, rows, SPANS)
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
        if left_sums is not None:
            scale = _one_over_spread(loaded, SPANS)[:, None] * (0.5 if GELU else 1.0)
        if out_sums is not None:
            total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, WIDE))
            squares = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, WIDE))
        if stream is not None:
            mbarrier.wait(stream_full.index(HALF), stream_phase)
            stream_phase ^= 1
        for two in gl.static_range(PARTS // 2):
            first, second = parts[2 * two], parts[2 * two + 1]
            at = HALF * BUFFERS + 2 * two % BUFFERS
            near, far = leaving.index(at), leaving.index(at + 1)
            if left_sums is not None:
                first = first * scale
                second = second * scale
            elif GELU:
                first, second = first * 0.5, second * 0.5
            if GELU:
                first = _gelu_of_twice(first + (shifts[2 * two].to(gl.float32) * 0.5)[None, :])
                second = _gelu_of_twice(second + (shifts[2 * two + 1].to(gl.float32) * 0.5)[None, :])
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
            if out_sums is not None:  # before rounding, which would cost its undoing
                total += gl.sum(first + second, 1)
                squares += gl.sum(first * first + second * second, 1)
            if stream is None:
                if two % (BUFFERS // 2) == 0:  # what left these buffers before has been read
                    tma.store_wait(0)
            near.store(first.to(out.dtype))
            far.store(second.to(out.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [row, column + 2 * PART * two], near)
            tma.async_copy_shared_to_global(out, [row, column + 2 * PART * two + PART], far)
        if out_sums is not None:
            at = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
            sums = out_sums + column // BN * 2 * rows + at
            gl.store(sums, total, mask=at < rows)
            gl.store(sums + rows, squares, mask=at < rows)
    tma.store_wait(0)


# Not specialised, so that no length or batch size is compiled anew.
COUNTS = ("row_tiles", "column_tiles", "steps", "rows", "length", "turned", "rows_of_sequence", "last_sequence")


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
    left_sums,
    out_sums,
    row_tiles,
    column_tiles,
    steps,
    rows,
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
    SPANS: gl.constexpr,
    BUFFERS: gl.constexpr,  # of a warpgroup, through which its finished parts leave
    REGISTERS: gl.constexpr,
):
    BM: gl.constexpr = ROWS * WARPGROUPS
    left_ring = gl.allocate_shared_memory(left.dtype, [STAGES, BM, BK], left.layout)
    right_ring = gl.allocate_shared_memory(right.dtype, [STAGES, BN, BK], right.layout)
    leaving = gl.allocate_shared_memory(out.dtype, [WARPGROUPS * BUFFERS, ROWS, PART], out.layout)
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
    places = (rows, length, turned, rows_of_sequence, last_sequence, gate_stride)
    tables = (bias, gate, cos, sin, left_sums, out_sums)
    gl.warp_specialize(
        [
            (_multiply, (out, stream, tables, rings, sizes, places, 0, BN, GROUP, PROGRAMS, GELU, PAIRS, SPANS)),
            (_multiply, (out, stream, tables, rings, sizes, places, 1, BN, GROUP, PROGRAMS, GELU, PAIRS, SPANS)),
            (_copy, (left, right, stream, rings, sizes, BN, BK, STAGES, GROUP, PROGRAMS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
