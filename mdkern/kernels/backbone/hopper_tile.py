"""What `hopper_linear` and `hopper_residual` share: tile sizes, the order of tiles, and splitting of register tiles."""

# mypy: ignore-errors
# ruff: noqa: N803

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mdkern.kernels.backbone import folded_norm
from mdkern.kernels.triton_common import halves

WARPGROUPS = gl.constexpr(2)  # consumer warpgroups, which multiply
ROWS = gl.constexpr(64)  # rows of one tensor-core instruction of a warpgroup
PART = gl.constexpr(64)  # columns that are finished at a time: 128 bytes, the width of the shared-memory swizzle
SPAN = gl.constexpr(folded_norm.SPAN)  # columns that one sum of a row covers

WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))


@gluon.jit
def _halves(x, layout: gl.constexpr):
    """Split a tensor-core result ``[R, C]`` into two of ``[R, C / 2]`` in `layout`, without moving a register."""
    left, right = halves(x)
    return gl.convert_layout(left, layout, True), gl.convert_layout(right, layout, True)


@gluon.jit
def _beside(left, right, layout: gl.constexpr):
    """Join what `_halves` split."""
    both = gl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])
    return gl.convert_layout(both, layout, True)


@gluon.jit
def _corner(tile, row_tiles, column_tiles, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of a tile. `GROUP` row tiles take all columns before the next ones begin, so that the right
    matrix stays in the cache."""
    first = tile // (GROUP * column_tiles) * GROUP
    rows = gl.minimum(row_tiles - first, GROUP)
    rest = tile % (GROUP * column_tiles)
    return (first + rest % rows) * BM, rest // rows * BN
