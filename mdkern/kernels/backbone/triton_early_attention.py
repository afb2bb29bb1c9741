"""`mdkern.kernels.backbone.early_attention` in Triton: each program has a tile of one head's queries."""

# mypy: ignore-errors
# ruff: noqa: N803

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mdkern.kernels.backbone.early_attention import HEAD_DIM, QUERIES, early_attention_reference
from mdkern.kernels.device import launches_early

LOG2E = tl.constexpr(1.4426950408889634)


class Tiling(NamedTuple):
    """Of a program: queries, keys in a step, warps, steps loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


TILING = Tiling(QUERIES, 64, 4, 3)


@triton.jit(do_not_specialize=["queries", "length"])
def early_attention_kernel(
    query,  # [B, Lq, H, HEAD_DIM]
    key,  # [B, L, H, HEAD_DIM]
    value,
    out,  # [B, Lq, H, HEAD_DIM], contiguous
    queries,  # Lq
    length,  # L
    query_text,  # strides
    query_row,
    query_head,
    key_text,
    key_row,
    key_head,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head, text = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    column, place = tl.arange(0, HEAD_DIM), tl.arange(0, KEYS)
    real = (row < queries)[:, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    read = query + text * query_text + head * query_head + row.to(tl.int64)[:, None] * query_row + column[None, :]
    q = tl.load(read, mask=real, other=0.0)
    offset = text * key_text + head * key_head
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    for start in tl.range(0, length, KEYS, num_stages=STAGES):
        there = start + place < length
        at = offset + (start + place).to(tl.int64)[:, None] * key_row + column[None, :]
        k = tl.load(key + at, mask=there[:, None], other=0.0)
        v = tl.load(value + at, mask=there[:, None], other=0.0)
        logits = tl.where(there[None, :], tl.dot(q, k.T) * scale, float("-inf"))
        highest = tl.maximum(most, tl.max(logits, 1))
        share = tl.exp2(logits - highest[:, None])
        fade = tl.exp2(most - highest)
        total = total * fade + tl.sum(share, 1)
        summed = tl.dot(share.to(v.dtype), v, summed * fade[:, None])
        most = highest
    write = out + ((text * queries + row)[:, None] * HEADS + head) * HEAD_DIM + column[None, :]
    tl.store(write, (summed / total[:, None]).to(out.dtype.element_ty), mask=real)


def early_attention(query: Tensor, key: Tensor, value: Tensor, tiling: Tiling = TILING) -> Tensor:
    """`early_attention` on a GPU (or, on the CPU, in Triton's interpreter)."""
    batch, queries, heads, head_dim = query.shape
    if query.dtype == torch.float64 or not key.shape[1]:
        return early_attention_reference(query, key, value)
    out = query.new_empty(query.shape)
    if not out.numel():
        return out
    early = launches_early(query.device)
    early_attention_kernel[(triton.cdiv(queries, tiling.queries), heads, batch)](
        query,
        key,
        value,
        out,
        queries,
        key.shape[1],
        *query.stride()[:3],
        *key.stride()[:3],
        HEAD_DIM**-0.5 * LOG2E.value,
        HEADS=heads,
        HEAD_DIM=head_dim,
        QUERIES=tiling.queries,
        KEYS=tiling.keys,
        STAGES=tiling.stages,
        PDL=early,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        launch_pdl=early,
    )
    return out
