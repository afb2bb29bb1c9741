"""`mdkern.kernels.backbone.attention_fp8` on a GPU."""

from __future__ import annotations

import triton
from torch import Tensor

from mdkern.kernels.backbone.attention import HEAD_DIM
from mdkern.kernels.backbone.hopper_attention_fp8 import attention_fp8_kernel
from mdkern.kernels.backbone.hopper_tile import ROWS, WARPGROUPS
from mdkern.kernels.backbone.launch_linear import describe
from mdkern.kernels.device import num_sms

KEYS = 128  # of a step
# STAGES of the ring, AHEAD: tiles of queries. REGISTERS: of a consumer thread; maxnreg: of every thread at the launch.
SETTING = {"STAGES": 4, "AHEAD": 2, "REGISTERS": 240, "num_warps": 4, "maxnreg": 168}


def attention_fp8(heads: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`attention_fp8` on a GPU."""
    (rows, columns), length, width = heads.shape, values.shape[1], len(scale) * HEAD_DIM
    out = heads.new_empty(rows, columns // 2)
    row_tiles = triton.cdiv(length, ROWS.value * WARPGROUPS.value)
    tiles = rows // length * len(scale) * row_tiles
    batch = rows // length
    query, key = heads.view(batch, length, 2, width).unbind(2)
    if tiles:
        programs = min(tiles, num_sms(heads.device))
        attention_fp8_kernel[(programs,)](
            describe(query, [1, ROWS.value, HEAD_DIM]),
            describe(key, [1, KEYS, HEAD_DIM]),
            describe(values.view(batch, width, length), [1, HEAD_DIM, KEYS]),
            describe(out.view(batch, length, width), [1, ROWS.value, HEAD_DIM]),
            scale,
            tiles,
            row_tiles,
            length,
            HEADS=len(scale),
            PROGRAMS=programs,
            **SETTING,
        )
    return out
