"""Launches `hopper_linear`, `hopper_resident` and `hopper_residual`: describes matrices to TMA, chooses the tiles.

Measurements of tiles, and what was tried: docs/notes/backbone.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels.backbone.hopper_linear import BLOCKS, COLUMNS, linear_kernel
from mdkern.kernels.backbone.hopper_resident import resident_kernel
from mdkern.kernels.backbone.hopper_residual import linear_residual_kernel
from mdkern.kernels.backbone.hopper_tile import PART, ROWS, SPAN, WARPGROUPS
from mdkern.kernels.backbone.quantise import FP8
from mdkern.kernels.device import num_sms
from mdkern.kernels.head.launch_hopper import ELEMENT
from mdkern.kernels.invariant import is_batch_invariant

LINE = 128  # bytes of a copied tile's rows: the width of the shared-memory swizzle
SUB = [ROWS.value, PART.value]  # what one store writes
LINEAR_TILE = (ROWS.value * BLOCKS.value, COLUMNS.value * WARPGROUPS.value)
RESIDUAL_TILE = (ROWS.value * WARPGROUPS.value, SPAN.value)
# Row tiles that take all columns before the next ones begin; the last is for matrices in e4m3.
LINEAR_GROUP, RESIDUAL_GROUP, SCALED_RESIDUAL_GROUP = 8, 16, 4
# STAGES: as many as shared memory holds. REGISTERS: of a consumer thread; maxnreg: of every thread at the launch.
SETTING = {"STAGES": 3, "REGISTERS": 240, "num_warps": 4, "maxnreg": 168}
RESIDENT_SETTING = SETTING | {"BUFFERS": 2}
RESIDENT_COLUMNS = 768  # of rows in e4m3 that are held: 144 KiB


def describe(matrix: Tensor, block: Sequence[int]) -> TensorDescriptor:
    block = list(block)
    element = gl.float8e4nv if matrix.dtype == FP8 else ELEMENT[matrix.dtype]
    return TensorDescriptor.from_tensor(matrix, block, gl.NVMMASharedLayout.get_default_for(block, element))


def cut(rows: int, columns: int, tile: tuple[int, int], device: torch.device) -> tuple[int, int, int]:
    """Number of row tiles, of column tiles, and of programs, which is compiled in: all that the card has in the
    batch-invariant mode, so that any number of rows runs the same code."""
    row_tiles, column_tiles = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    most = num_sms(device)
    return row_tiles, column_tiles, most if is_batch_invariant() else min(most, row_tiles * column_tiles)


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    length: int = 1,
    rotated: int = 0,
    gelu: bool = False,
    sums: Tensor | None = None,
    scale: Tensor | None = None,
    level: Tensor | None = None,
    values: Tensor | None = None,
) -> None:
    """``out = [gelu] (x @ weight.T + bias)``, the first `rotated` columns rotated by `cos`, `sin`.

    With `sums`, the `row_sums` of `x`, each row of the product is divided by the standard deviation of its row of `x`.
    They are of spans of 256 columns, or of half as many.
    With matrices in e4m3 `scale` multiplies the columns of the product, and `level`, if given, those of the result.
    `values`, if given, receives the columns that are not rotated, as `linear_fp8.scaled_heads` says.
    """
    depth = LINE // x.element_size()
    row_tiles, column_tiles, programs = cut(x.shape[0], weight.shape[0], LINEAR_TILE, x.device)
    linear_kernel[(programs,)](
        describe(x, [ROWS.value, depth]),
        describe(weight, [LINEAR_TILE[1], depth]),
        describe(out, SUB),
        None if values is None else describe(values, SUB),
        bias,
        cos,
        sin,
        sums,
        scale,
        level,
        row_tiles,
        column_tiles,
        triton.cdiv(x.shape[1], depth),
        x.shape[0],
        length,
        rotated,
        BK=depth,
        GROUP=LINEAR_GROUP,
        PROGRAMS=programs,
        GELU=gelu,
        PAIRS=0 if cos is None else cos.shape[1],
        SPANS=0 if sums is None else x.shape[1] // SPAN.value,
        SUMS=1 if sums is None else sums.shape[0] * SPAN.value // x.shape[1],
        **SETTING,
    )


def stays_resident(x: Tensor) -> bool:
    """Whether `hopper_resident` can hold 192 of these rows in shared memory."""
    return x.element_size() == 1 and x.shape[1] % LINE == 0 and x.shape[1] <= RESIDENT_COLUMNS


def resident_gelu(x: Tensor, weight: Tensor, out: Tensor, *, bias: Tensor, scale: Tensor, level: Tensor) -> None:
    """`linear` with GELU of matrices in e4m3 whose rows `stays_resident`."""
    row_tiles, column_tiles, programs = cut(x.shape[0], weight.shape[0], LINEAR_TILE, x.device)
    resident_kernel[(programs,)](
        describe(x, [ROWS.value, LINE]),
        describe(weight, [COLUMNS.value, LINE]),
        describe(out, SUB),
        bias,
        scale,
        level,
        row_tiles,
        column_tiles,
        x.shape[0],
        BK=LINE,
        STEPS=x.shape[1] // LINE,
        PROGRAMS=programs,
        **RESIDENT_SETTING,
    )


def linear_residual(
    stream: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    sums: Tensor | None,
    scaled: bool = False,
) -> None:
    """``stream += gate * (x @ weight.T + bias)``; `sums`, if given, receives the `row_sums` of the new rows.

    With `scaled`, for matrices in e4m3, it is ``stream += gate * (x @ weight.T) + bias``, of a gate and bias ``[C]``
    in float32.
    """
    depth = LINE // x.element_size()
    row_tiles, column_tiles, programs = cut(x.shape[0], weight.shape[0], RESIDUAL_TILE, x.device)
    sequences = gate.shape[0] if gate.ndim == 2 else 1
    linear_residual_kernel[(programs,)](
        describe(x, [RESIDUAL_TILE[0], depth]),
        describe(weight, [RESIDUAL_TILE[1], depth]),
        describe(stream, SUB),
        bias,
        gate,
        sums,
        row_tiles,
        column_tiles,
        triton.cdiv(x.shape[1], depth),
        x.shape[0],
        x.shape[0] // sequences,
        sequences - 1,
        gate.stride(0) if sequences > 1 else 0,
        BK=depth,
        GROUP=SCALED_RESIDUAL_GROUP if scaled else RESIDUAL_GROUP,
        PROGRAMS=programs,
        SCALED=scaled,
        **SETTING,
    )
