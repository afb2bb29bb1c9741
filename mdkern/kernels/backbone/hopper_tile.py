"""What the products of `hopper_linear` and `hopper_residual` share: how tiles are cut, placed and taken apart."""

# mypy: ignore-errors
# ruff: noqa: N803

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mdkern.kernels.backbone import folded_norm
from mdkern.kernels.triton_common import halves

WARPGROUPS = gl.constexpr(2)  # that multiply
ROWS = gl.constexpr(64)  # of a tensor-core instruction of a warpgroup
PART = gl.constexpr(64)  # columns that are finished at a time: 128 bytes, the width of the shared-memory swizzle
SPAN = gl.constexpr(folded_norm.SPAN)  # columns that a row's sums are of

WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))


@gluon.jit
def _halves(x, layout: gl.constexpr):
    """``[R, C]`` as the tensor cores leave it, as two of ``[R, C / 2]`` in `layout`: no register moves."""
    left, right = halves(x)
    return gl.convert_layout(left, layout, True), gl.convert_layout(right, layout, True)


@gluon.jit
def _beside(left, right, layout: gl.constexpr):
    """Undoes `_halves`."""
    both = gl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])
    return gl.convert_layout(both, layout, True)


@gluon.jit
def _corner(tile, row_tiles, column_tiles, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """Top left of a tile: `GROUP` row tiles by all columns at a time, so that the second operand stays in the cache."""
    first = tile // (GROUP * column_tiles) * GROUP
    rows = gl.minimum(row_tiles - first, GROUP)
    rest = tile % (GROUP * column_tiles)
    return (first + rest % rows) * BM, rest // rows * BN
