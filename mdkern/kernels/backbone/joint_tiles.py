"""Tiles of `hopper_joint`, and for which products they pay. Measurements: docs/notes/llama.md."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 64  # rows of weights in a block
MOST_ROWS = 4096  # of x; more were not measured
LEAST_FILL = {False: 0.95, True: 0.7}  # with gate and up, which save the activation's pass


class Tiling(NamedTuple):
    """Of a program: blocks of rows of weights, rows of x, and how long a tile takes beside others."""

    blocks: int
    rows: int
    time: int = 0


TILINGS = (Tiling(2, 256, 46), Tiling(3, 128, 36), Tiling(2, 128, 24), Tiling(1, 128, 17))


IN_PARTS = Tiling(2, 256)  # of products whose inner dimension is divided


def rounds_of(tiling: Tiling, rows: int, columns: int, programs: int) -> int:
    """How many tiles a program does one after the other; `columns` are the rows of all weights."""
    return -(-(-(-rows // tiling.rows) * -(-columns // (BLOCK * tiling.blocks))) // programs)


def choose_tiling(rows: int, columns: int, programs: int) -> Tiling:
    """The tiles that are done first."""
    return min(TILINGS, key=lambda tiling: tiling.time * rounds_of(tiling, rows, columns, programs))


def pays(rows: int, columns: int, programs: int, gated: bool) -> bool:
    """Whether the tiles are done in one round, or leave little of the last one empty."""
    tiling = choose_tiling(rows, columns, programs)
    rounds = rounds_of(tiling, rows, columns, programs)
    fill = rows * columns / (rounds * programs * tiling.rows * BLOCK * tiling.blocks)
    return rounds == 1 or fill >= LEAST_FILL[gated]


def pays_in_parts(rows: int, columns: int, parts: int, programs: int) -> bool:
    """Whether the tiles of all parts of the inner dimension are done in one round, and leave little empty."""
    tiles = parts * -(-columns // (BLOCK * IN_PARTS.blocks))
    return IN_PARTS.rows // 2 < rows <= IN_PARTS.rows and LEAST_FILL[False] * programs <= tiles <= programs
