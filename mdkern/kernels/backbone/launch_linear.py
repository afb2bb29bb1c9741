"""Launches `hopper_linear` and `hopper_residual`: describes matrices to the bulk-copy engine, shares out the tiles.

What tiles of 192 x 256 instead of 128 x 256 bring `hopper_linear` (one H200, bf16, width 768, us; cuBLAS's at 16,384
rows of another card): queries, keys and values, turned, and up with GELU, both with bias and norm,

    rows                     16,384, at the power limit   16,384         8,192         6,000         4,096
    192 x 256                110.2, 143.3                 96.6, 122.5    53.2, 64.3    49.6, 49.5    36.4, 34.8
    128 x 256                112.5, 150.6                 94.2, 127.1    55.2, 67.6    44.8, 57.2    35.0, 36.9
    cuBLAS, product alone    100.3, 133.1                 90.7, 116.5    46.7, 59.7    36.5, 46.3    24.6, 33.0

Where tiles fill the processors badly the larger ones lose: 6,000 rows of queries, keys and values are 288 on 132.
Without an epilogue the power limit leaves the larger ones 98.9 and 130.2 us, the smaller ones 101.3 and 134.0.

Tried and left out: CUDA C++ with clusters of two that share the weight's tile by multicast, 128 x 256 (at the limit
108.9 and 146.7 us where the smaller ones above took 112.6 and 149.8); the next tile begun block by block while the last
one is finished (110.2 and 143.8); cosines and sines interleaved in one table (3 us less for queries, keys and values).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels.backbone.hopper_linear import BLOCKS, COLUMNS, _linear
from mdkern.kernels.backbone.hopper_residual import _add_linear
from mdkern.kernels.backbone.hopper_tile import PART, ROWS, SPAN, WARPGROUPS
from mdkern.kernels.device import num_sms
from mdkern.kernels.head.launch_hopper import ELEMENT

DEPTH = 64  # columns of a copied tile: 128 bytes, the width of the shared-memory swizzle
SUB = [ROWS.value, PART.value]  # what leaves at a time
LINEAR_TILE = (ROWS.value * BLOCKS.value, COLUMNS.value * WARPGROUPS.value)
RESIDUAL_TILE = (ROWS.value * WARPGROUPS.value, SPAN.value)
# Row tiles that go by all columns together. With 16 the products above took 1 to 3 % longer at the power limit.
LINEAR_GROUP, RESIDUAL_GROUP = 8, 16
# As many stages of the ring as shared memory holds; registers of a multiplying thread, and of any at launch.
SETTING = {"BK": DEPTH, "STAGES": 3, "REGISTERS": 240, "num_warps": 4, "maxnreg": 168}


def describe(matrix: Tensor, block: Sequence[int]) -> TensorDescriptor:
    block = list(block)
    return TensorDescriptor.from_tensor(
        matrix, block, gl.NVMMASharedLayout.get_default_for(block, ELEMENT[matrix.dtype])
    )


def cut(rows: int, columns: int, tile: tuple[int, int], device: torch.device) -> tuple[int, int, int]:
    """Tiles of rows and of columns, and programs."""
    row_tiles, column_tiles = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    return row_tiles, column_tiles, min(num_sms(device), row_tiles * column_tiles)


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    length: int = 1,
    turned: int = 0,
    gelu: bool = False,
    sums: Tensor | None = None,
) -> None:
    """``out = [gelu] (x @ weight.T + bias)``, the first `turned` columns turned by `cos`, `sin`.

    `sums` are of the rows of `x`, which are divided by their spread.
    """
    row_tiles, column_tiles, programs = cut(x.shape[0], weight.shape[0], LINEAR_TILE, x.device)
    _linear[(programs,)](
        describe(x, [ROWS.value, DEPTH]),
        describe(weight, [LINEAR_TILE[1], DEPTH]),
        describe(out, SUB),
        bias,
        cos,
        sin,
        sums,
        row_tiles,
        column_tiles,
        triton.cdiv(x.shape[1], DEPTH),
        x.shape[0],
        length,
        turned,
        GROUP=LINEAR_GROUP,
        PROGRAMS=programs,
        GELU=gelu,
        PAIRS=0 if cos is None else cos.shape[1],
        SPANS=0 if sums is None else sums.shape[0],
        **SETTING,
    )


def add_linear(
    stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, sums: Tensor | None
) -> None:
    """``stream += gate * (x @ weight.T + bias)``; `sums` is where those of the new rows go."""
    row_tiles, column_tiles, programs = cut(x.shape[0], weight.shape[0], RESIDUAL_TILE, x.device)
    sequences = gate.shape[0] if gate.ndim == 2 else 1
    _add_linear[(programs,)](
        describe(x, [RESIDUAL_TILE[0], DEPTH]),
        describe(weight, [RESIDUAL_TILE[1], DEPTH]),
        describe(stream, SUB),
        bias,
        gate,
        sums,
        row_tiles,
        column_tiles,
        triton.cdiv(x.shape[1], DEPTH),
        x.shape[0],
        x.shape[0] // sequences,
        sequences - 1,
        gate.stride(0) if sequences > 1 else 0,
        GROUP=RESIDUAL_GROUP,
        PROGRAMS=programs,
        **SETTING,
    )
