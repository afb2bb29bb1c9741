"""`mdkern.kernels.backbone.attention` on a GPU: of few sequences in Triton, of many in Gluon."""

from __future__ import annotations

import triton
from torch import Tensor

from mdkern.kernels.backbone import triton_attention
from mdkern.kernels.backbone.attention import GROUPS, HEAD_DIM, is_whole, takes_many
from mdkern.kernels.backbone.hopper_attention import attention_kernel
from mdkern.kernels.backbone.hopper_tile import ROWS
from mdkern.kernels.backbone.launch_linear import describe
from mdkern.kernels.device import num_sms

KEYS = 64  # of a step
# STAGES of the ring, AHEAD: tiles of queries. REGISTERS: of a consumer thread; maxnreg: of every thread at the launch.
SETTING = {"STAGES": 4, "AHEAD": 2, "REGISTERS": 112, "num_warps": 4, "maxnreg": 96}


def attention(query: Tensor, key: Tensor, value: Tensor, arrived: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` on a GPU."""
    batch, length, heads, _ = query.shape
    if is_whole(query, key, mask) and takes_many(batch, length, heads, query.device):
        return attention_of_many(query, key, value)
    return triton_attention.attention(query, key, value, arrived, mask)


def attention_of_many(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of sequences ``[B, L, H, 64]``, of which nothing is hidden."""
    batch, length, heads, _ = query.shape
    out = query.new_empty(batch, length, heads * HEAD_DIM)
    row_tiles = triton.cdiv(length, ROWS.value * GROUPS)
    tiles = batch * heads * row_tiles
    programs = min(tiles, num_sms(query.device))
    attention_kernel[(programs,)](
        describe(query.flatten(2), [1, ROWS.value, HEAD_DIM]),
        describe(key.flatten(2), [1, KEYS, HEAD_DIM]),
        describe(value.flatten(2), [1, KEYS, HEAD_DIM]),
        describe(out, [1, ROWS.value, HEAD_DIM]),
        tiles,
        row_tiles,
        length,
        HEADS=heads,
        MASKED=length % KEYS != 0,
        PROGRAMS=programs,
        **SETTING,
    )
    return out
