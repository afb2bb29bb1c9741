"""`mdkern.kernels.backbone.linear` for Hopper, in Gluon: matrix products with the next operation in their epilogue.

One persistent program runs on each multiprocessor. A producer warp copies tiles into a ring in shared memory, and runs
ahead past the end of an output tile; two consumer warpgroups each multiply 192 rows by 128 columns and finish them in
registers, 64 rows at a time. The finished rows are stored through buffers of their own while the next tile is
multiplied; values for attention in e4m3 are transposed there. With sums of the rows, the epilogue also divides by each
row's standard deviation, as a folded layer normalisation needs (`kernels.backbone.folded_norm`). Of matrices in e4m3 it
multiplies each column by its scale and, if the result is in e4m3, too, by its level (`kernels.backbone.linear_fp8`).

The tile of 192 x 256 is as large as registers allow: it takes 192 of a thread's 240. Measurements of tiles:
docs/notes/backbone.md. The index into the sums, rows times twice the spans of a row, must stay below 2^31, which is 89
million rows of 3,072 columns.
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

from mdkern.kernels.backbone.hopper_tile import PART, ROWS, SPAN, WARPGROUPS, WIDE, _beside, _corner, _halves
from mdkern.kernels.backbone.norm_constants import EPS as NORM_EPS
from mdkern.kernels.gluon_common import ring_advance

BLOCKS = gl.constexpr(3)  # blocks of `ROWS` rows in a tile
COLUMNS = gl.constexpr(128)  # columns of one warpgroup
BUFFERS = gl.constexpr(3)  # output buffers of a warpgroup, 64 x 64 each
PADDED = gl.constexpr(256)  # a tile's 192 rows, rounded up to a power of two
EPS = gl.constexpr(NORM_EPS)

# The register layouts of 32 and 16 columns of a tensor-core result.
THIN = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16]))
SLIM = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16]))
FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
PAIRWISE = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _gelu_of_twice(h):
    """``gelu(2 h)`` in the tanh form, with a hyperbolic tangent accurate to 2^-11."""
    inner = h * (1.5957691216057308 + 0.28541926508900104 * (h * h))
    t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=gl.float32, is_pure=True, pack=1)
    return h * t + h


@gluon.jit
def _of_span(sums, span, squared: gl.constexpr, at, rows, SUMS: gl.constexpr):
    """The sums of a span of 256 columns, which may be of two halves."""
    x = gl.load(sums + (2 * SUMS * span + squared) * rows + at, mask=at < rows, other=0.0)
    if SUMS == 2:
        x += gl.load(sums + (2 * SUMS * span + 2 + squared) * rows + at, mask=at < rows, other=0.0)
    return x


@gluon.jit
def _one_over_spread(sums, row, rows, SPANS: gl.constexpr, SUMS: gl.constexpr):
    """One over the standard deviation of a tile's rows, from their sums and sums of squares."""
    at = row + gl.arange(0, PADDED, layout=PAIRWISE)
    total = _of_span(sums, 0, 0, at, rows, SUMS)
    squares = _of_span(sums, 0, 1, at, rows, SUMS)
    for span in gl.static_range(1, SPANS):
        total += _of_span(sums, span, 0, at, rows, SUMS)
        squares += _of_span(sums, span, 1, at, rows, SUMS)
    mean = total / (SPANS * SPAN)
    variance = squares / (SPANS * SPAN) - mean * mean
    return gl.rsqrt(gl.maximum(variance, 0.0) + EPS)


@gluon.jit
def _load_angles(cos, sin, row, length, PAIRS: gl.constexpr, UNIT: gl.constexpr):
    """Cosines and sines of 16 pairs of columns at the positions of 64 rows."""
    position = (row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SLIM))) % length
    pair = UNIT * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, SLIM))
    at = position[:, None] * PAIRS + pair[None, :]
    return gl.load(cos + at), gl.load(sin + at)


@gluon.jit
def _rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@gluon.jit
def _quarters(x):
    """Split ``[64, 64]`` into four of ``[64, 16]`` without moving a register."""
    left, right = _halves(x, THIN)
    return _halves(left, SLIM) + _halves(right, SLIM)


@gluon.jit
def _whole(quarters):
    """Join what `_quarters` split."""
    return _beside(_beside(quarters[0], quarters[1], THIN), _beside(quarters[2], quarters[3], THIN), WIDE)


@gluon.jit
def _rotate_across(first, second, cos, sin, row, length):
    """Rotate a head of 128 columns, whose halves are `first` and `second`."""
    left, right = _quarters(first), _quarters(second)
    begun, ended = (), ()
    for unit in gl.static_range(4):
        c, s = _load_angles(cos, sin, row, length, 64, unit)
        a, b = _rotate(left[unit], right[unit], c, s)
        begun, ended = begun + (a,), ended + (b,)
    return _whole(begun), _whole(ended)


@gluon.jit
def _rotate_within(first, second, cos, sin, row, length):
    """Rotate two heads of 64 columns."""
    left, right = _quarters(first), _quarters(second)
    c, s = _load_angles(cos, sin, row, length, 32, 0)
    a, e = _rotate(left[0], left[2], c, s)
    f, g = _rotate(right[0], right[2], c, s)
    c, s = _load_angles(cos, sin, row, length, 32, 1)
    b, h = _rotate(left[1], left[3], c, s)
    i, j = _rotate(right[1], right[3], c, s)
    return _whole((a, b, e, h)), _whole((f, i, g, j))


@gluon.jit
def _rotate_heads(first, second, cos, sin, row, length, PAIRS: gl.constexpr):
    """Rotate 128 columns: two heads of 64, or one of 128."""
    if PAIRS == 32:
        first, second = _rotate_within(first, second, cos, sin, row, length)
    else:
        first, second = _rotate_across(first, second, cos, sin, row, length)
    return first, second


@gluon.jit
def _produce(
    left,
    right,
    rings,
    sizes,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """The producer warp: copies tiles into the ring."""
    left_ring, right_ring, _, _, full, empty = rings
    row_tiles, column_tiles, steps = sizes
    BYTES: gl.constexpr = BK * left.dtype.primitive_bitwidth // 8
    BM: gl.constexpr = ROWS * BLOCKS
    BN: gl.constexpr = COLUMNS * WARPGROUPS
    program = gl.program_id(0)
    stage = program * 0
    phase = stage + 1
    for tile in range(program, row_tiles * column_tiles, PROGRAMS):
        row, column = _corner(tile, row_tiles, column_tiles, BM, BN, GROUP)
        for k in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (BM + BN) * BYTES)
            tma.async_copy_global_to_shared(right, [column, k * BK], ready, right_ring.index(stage))
            for block in gl.static_range(BLOCKS):  # one bulk copy takes a power of two of rows
                buffer = left_ring.index(stage * BLOCKS + block)
                tma.async_copy_global_to_shared(left, [row + ROWS * block, k * BK], ready, buffer)
            stage, phase = ring_advance(stage, phase, STAGES)


@gluon.jit
def _step(products, rings, stage, phase, HALF: gl.constexpr, FIRST: gl.constexpr):
    """Start the multiplication of one step of the inner dimension; it is not waited for here."""
    left_ring, right_ring, _, _, full, _ = rings
    mbarrier.wait(full.index(stage), phase)
    right = right_ring.index(stage).slice(HALF * COLUMNS, COLUMNS, dim=0).permute((1, 0))
    begun = ()
    for block in gl.static_range(BLOCKS):
        left = left_ring.index(stage * BLOCKS + block)
        begun = begun + (warpgroup_mma(left, right, products[block], use_acc=not FIRST, is_async=True),)
    return begun


@gluon.jit
def _set_aside(
    tables, rings, row, column, rows, HALF: gl.constexpr, SPANS: gl.constexpr, SUMS: gl.constexpr, FACTOR: gl.constexpr
):  # fmt: skip
    """Fetch what the epilogue needs into shared memory, as there is no room for it in registers."""
    bias, _, _, sums, scale, level = tables
    _, _, _, aside, _, _ = rings
    shifts, spreads, scales, levels = aside
    at = column + gl.arange(0, COLUMNS, layout=FLAT)
    if bias is not None:
        fetched = gl.load(bias + at)
    if scale is not None:
        fetched_scale = gl.load(scale + at)
    if level is not None:
        fetched_level = gl.load(level + at)
    if sums is not None:
        spreads.index(HALF).store(_one_over_spread(sums, row, rows, SPANS, SUMS) * FACTOR)
    if bias is not None:
        shifts.index(HALF).store(fetched)
    if scale is not None:
        scales.index(HALF).store(fetched_scale * FACTOR)
    if level is not None:
        levels.index(HALF).store(fetched_level)


@gluon.jit
def _of_columns(aside, HALF: gl.constexpr, SIDE: gl.constexpr):
    """What was set aside for the 64 columns of a part of the product, as a row."""
    return aside.index(HALF).slice(SIDE * PART, PART).load(gl.SliceLayout(0, WIDE)).to(gl.float32)[None, :]


@gluon.jit
def _affine(x, tables, rings, HALF: gl.constexpr, BLOCK: gl.constexpr, SIDE: gl.constexpr, FACTOR: gl.constexpr):
    """A 64 x 64 part of the product, scaled by row or by column, plus the bias, all times `FACTOR`."""
    bias, _, _, sums, scale, _ = tables
    _, _, _, aside, _, _ = rings
    shifts, spreads, scales, _ = aside
    if sums is not None:
        x = x * spreads.index(HALF).slice(BLOCK * ROWS, ROWS).load(gl.SliceLayout(1, WIDE))[:, None]
    elif scale is not None:
        x = x * _of_columns(scales, HALF, SIDE)
    elif FACTOR != 1.0:
        x = x * FACTOR
    if bias is not None:
        x += _of_columns(shifts, HALF, SIDE) * FACTOR
    return x


@gluon.jit
def _activate(x, tables, rings, HALF: gl.constexpr, SIDE: gl.constexpr):
    """The GELU of twice a part of the product, times the columns' levels if there are any."""
    _, _, _, _, _, level = tables
    _, _, _, aside, _, _ = rings
    x = _gelu_of_twice(x)
    if level is not None:
        x = x * _of_columns(aside[3], HALF, SIDE)
    return x


@gluon.jit
def _leave(x, out, leaving, row, column, HALF: gl.constexpr, NUMBER: gl.constexpr, BUFFERS: gl.constexpr):
    buffer = leaving.index(HALF * BUFFERS + NUMBER % BUFFERS)
    tma.store_wait(BUFFERS - 1)  # the earlier store from this buffer has read it
    buffer.store(x.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], buffer)


@gluon.jit
def _across(x):
    """64 tokens by 64 dimensions transposed, the tokens in the order of `attention_fp8.in_order`. No register moves."""
    ordered = x.reshape(2, 2, 2, 4, 2, PART).permute(0, 1, 3, 2, 4, 5)
    return ordered.reshape(ROWS, PART).permute(1, 0)


@gluon.jit
def _consume(
    out,
    values,
    tables,
    rings,
    sizes,
    places,
    HALF: gl.constexpr,  # which half of the tile's columns
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    GELU: gl.constexpr,
    PAIRS: gl.constexpr,  # head_dim / 2
    SPANS: gl.constexpr,  # spans of a row of the left matrix that there are sums of; 0: no sums
    SUMS: gl.constexpr,  # of a span: 1, or 2 of halves
):
    """A consumer warpgroup: multiplies the tiles and finishes their product."""
    _, cos, sin, _, _, _ = tables
    _, right_ring, leaving, _, _, empty = rings
    row_tiles, column_tiles, steps = sizes
    rows, length, rotated = places
    STAGES: gl.constexpr = right_ring.shape[0]
    FACTOR: gl.constexpr = 0.5 if GELU else 1.0
    product_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, COLUMNS, 256 // right_ring.dtype.primitive_bitwidth]
    )
    program = gl.program_id(0)
    stage = program * 0
    phase = program * 0
    for tile in range(program, row_tiles * column_tiles, PROGRAMS):
        row, column = _corner(tile, row_tiles, column_tiles, ROWS * BLOCKS, COLUMNS * WARPGROUPS, GROUP)
        column += HALF * COLUMNS
        nothing = gl.zeros([ROWS, COLUMNS], gl.float32, layout=product_layout)
        products = _step((nothing, nothing, nothing), rings, stage, phase, HALF, True)
        _set_aside(tables, rings, row, column, rows, HALF, SPANS, SUMS, FACTOR)
        a, b, c = warpgroup_mma_wait(BLOCKS, deps=products)  # lets all three run on
        previous = stage + 0  # a copy, as the compiler would take `stage` itself for a constant of the loop
        stage, phase = ring_advance(stage, phase, STAGES)
        for _k in range(1, steps):
            products = _step((a, b, c), rings, stage, phase, HALF, False)
            a, b, c = warpgroup_mma_wait(BLOCKS, deps=products)
            mbarrier.arrive(empty.index(previous))
            previous = stage + 0
            stage, phase = ring_advance(stage, phase, STAGES)

        a, b, c = warpgroup_mma_wait(BLOCKS - 1, deps=(a, b, c))
        for block in gl.static_range(BLOCKS):
            if block == 1:
                a, b, c = warpgroup_mma_wait(0, deps=(a, b, c))
                mbarrier.arrive(empty.index(previous))
            at = row + ROWS * block
            first, second = _halves(a if block == 0 else b if block == 1 else c, WIDE)
            first = _affine(first, tables, rings, HALF, block, 0, FACTOR)
            if GELU:
                first = _activate(first, tables, rings, HALF, 0)
            if cos is None:
                _leave(first, out, leaving, at, column, HALF, 2 * block, BUFFERS)
            second = _affine(second, tables, rings, HALF, block, 1, FACTOR)
            if GELU:
                second = _activate(second, tables, rings, HALF, 1)
            if cos is not None:  # noqa: SIM102  known when it is compiled, unlike the next
                if column < rotated:
                    first, second = _rotate_heads(first, second, cos, sin, at, length, PAIRS)
            if values is None:
                if cos is not None:
                    _leave(first, out, leaving, at, column, HALF, 2 * block, BUFFERS)
                _leave(second, out, leaving, at, column + PART, HALF, 2 * block + 1, BUFFERS)
            elif column < rotated:
                _leave(first, out, leaving, at, column, HALF, 2 * block, BUFFERS)
                _leave(second, out, leaving, at, column + PART, HALF, 2 * block + 1, BUFFERS)
            else:
                dimension = at // length * (rotated // 2) + column - rotated
                _leave(_across(first), values, leaving, dimension, at % length, HALF, 2 * block, BUFFERS)
                _leave(_across(second), values, leaving, dimension + PART, at % length, HALF, 2 * block + 1, BUFFERS)
    tma.store_wait(0)


# These arguments are not specialised, so that a new length or batch size compiles nothing.
COUNTS = ("row_tiles", "column_tiles", "steps", "rows", "length", "rotated")


@gluon.jit(do_not_specialize=COUNTS)
def linear_kernel(
    left,  # descriptor of [M, K]
    right,  # descriptor of [N, K]
    out,  # descriptor of [M, N]; with `values` of the first two thirds of the columns, which are rotated
    values,  # descriptor of [M / length * N / 3, length], the other third
    bias,
    cos,
    sin,
    sums,
    scale,
    level,
    row_tiles,
    column_tiles,
    steps,
    rows,
    length,
    rotated,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    GELU: gl.constexpr,
    PAIRS: gl.constexpr,
    SPANS: gl.constexpr,
    SUMS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    left_ring = gl.allocate_shared_memory(left.dtype, [STAGES * BLOCKS, ROWS, BK], left.layout)
    right_ring = gl.allocate_shared_memory(right.dtype, [STAGES, COLUMNS * WARPGROUPS, BK], right.layout)
    leaving = gl.allocate_shared_memory(out.dtype, [WARPGROUPS * BUFFERS, ROWS, PART], out.layout)
    SHIFT: gl.constexpr = out.dtype if bias is None else bias.dtype.element_ty
    shifts = gl.allocate_shared_memory(SHIFT, [WARPGROUPS, COLUMNS], PLAIN)
    spreads = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, PADDED], PLAIN)
    scales = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, COLUMNS], PLAIN)
    levels = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, COLUMNS], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    fence_async_shared()
    # A constexpr that is put into a variable is no longer one, so each call spells its constant arguments out.
    rings = (left_ring, right_ring, leaving, (shifts, spreads, scales, levels), full, empty)
    sizes = (row_tiles, column_tiles, steps)
    places = (rows, length, rotated)
    tables = (bias, cos, sin, sums, scale, level)
    gl.warp_specialize(
        [
            (_consume, (out, values, tables, rings, sizes, places, 0, GROUP, PROGRAMS, GELU, PAIRS, SPANS, SUMS)),
            (_consume, (out, values, tables, rings, sizes, places, 1, GROUP, PROGRAMS, GELU, PAIRS, SPANS, SUMS)),
            (_produce, (left, right, rings, sizes, BK, STAGES, GROUP, PROGRAMS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
