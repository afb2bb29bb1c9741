"""Where a warp of `hopper_projection` is in its program's work."""

# mypy: ignore-errors
# ruff: noqa: N803

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mdkern.kernels.head.triton_projection import locate_item


@gluon.jit
def item_position(item, program, schedule, PROGRAMS: gl.constexpr, FIXED: gl.constexpr):
    """An item of a program's work: its row tile; the first and last of its vocabulary tiles and their distance; and the
    number of its partial result."""
    whole, _, chunk, splits, _, vocab_tiles = schedule
    row_tile, part, partial = locate_item(item, program, schedule, PROGRAMS, FIXED)
    first = part
    last = vocab_tiles
    stride = program * 0 + 1
    if row_tile >= whole:  # neighbouring programs take neighbouring tiles
        last = gl.minimum(splits * chunk, vocab_tiles)
        stride = splits
        if part == splits:
            first = last
            last = vocab_tiles
            stride = stride * 0 + 1
    return row_tile, first, last, stride, partial
