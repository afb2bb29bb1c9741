"""`mdkern.kernels.backbone.invariant_attention` in Triton: softmax in one pass over the keys (Dao, 2307.08691).

Tiles of keys begin at column 0 and are of one size. A tile that a row does not see leaves its state as it was, bit for
bit: the maximum stays, its factor is 1, and zeros are added. One compiled kernel serves texts with and without padding.
"""

# mypy: ignore-errors
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.device import capability
from mdkern.kernels.triton_common import LOG2E

MASK_STRIDES = ["mask_batch", "mask_head", "mask_row", "mask_column"]


@triton.jit(do_not_specialize=["queries", "keys", "row_tiles", *MASK_STRIDES])
def invariant_attention_kernel(
    query,
    key,
    value,
    mask,  # uint8
    out,  # [B, Q, H, D]
    queries,  # Q
    keys,  # K
    row_tiles,
    heads,
    shared,  # heads of queries that share keys
    query_batch,  # strides
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    scale,  # times log2(e)
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    MASK_ROWS: tl.constexpr,  # whether queries of a sequence differ in what they see
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head, sequence = (program // row_tiles % heads).to(tl.int64), (program // row_tiles // heads).to(tl.int64)
    row = program % row_tiles * BM + tl.arange(0, BM)
    dimension = tl.arange(0, DIM_BLOCK)
    there, within = row < queries, dimension < DIM
    at = query + sequence * query_batch + head * query_head + row.to(tl.int64)[:, None] * query_row + dimension[None, :]
    q = tl.load(at, mask=there[:, None] & within[None, :], other=0.0)
    key += sequence * key_batch + head // shared * key_head
    value += sequence * value_batch + head // shared * value_head
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    attended = tl.zeros([BM, DIM_BLOCK], tl.float32)
    for start in range(0, keys, BN):
        column = start + tl.arange(0, BN)
        inside = column < keys
        place = column.to(tl.int64)
        k = tl.load(
            key + place[None, :] * key_row + dimension[:, None], mask=within[:, None] & inside[None, :], other=0.0
        )
        x = tl.dot(q, k, input_precision=PRECISION)
        seen = inside[None, :]
        shown = mask + sequence * mask_batch + head * mask_head + place[None, :] * mask_column
        if MASK_ROWS:
            shown += row.to(tl.int64)[:, None] * mask_row
            seen = seen & there[:, None]
        seen = seen & (tl.load(shown, mask=seen, other=0) != 0)
        x = tl.where(seen, x, -float("inf"))
        peak = tl.maximum(top, tl.max(x, 1))
        anchor = tl.where(peak == -float("inf"), 0.0, peak * scale)
        weight = tl.exp2(x * scale - anchor[:, None])
        # Exactly 1 where the maximum stays: the difference, as one fused operation, is the product's rounding error.
        rescale = tl.where(peak == top, 1.0, tl.exp2(top * scale - anchor))
        total = total * rescale + tl.sum(weight, 1)
        attended = attended * rescale[:, None]
        v = tl.load(
            value + place[:, None] * value_row + dimension[None, :], mask=inside[:, None] & within[None, :], other=0.0
        )
        attended = tl.dot(weight.to(v.dtype), v, attended, input_precision=PRECISION)
        top = peak
    attended = attended / tl.where(total == 0.0, 1.0, total)[:, None]
    to = out + ((sequence * queries + row.to(tl.int64)) * heads + head)[:, None] * DIM + dimension[None, :]
    tl.store(to, attended.to(out.dtype.element_ty), mask=there[:, None] & within[None, :])


def tile_of(dtype: torch.dtype, head_dim: int, device: torch.device) -> dict[str, Any]:
    """The tile and how it is run. It may depend on dtype, head and card, and never on the batch or on lengths."""
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "PRECISION": "ieee", "num_warps": 4, "num_stages": 1}
    stages = 3 if capability(device) >= 9 else 2
    if head_dim <= 64:
        return {"BM": 128, "BN": 64, "PRECISION": "ieee", "num_warps": 4, "num_stages": stages}
    if head_dim <= 128:
        return {"BM": 128, "BN": 64, "PRECISION": "ieee", "num_warps": 8, "num_stages": 2}
    return {"BM": 64, "BN": 32, "PRECISION": "ieee", "num_warps": 8, "num_stages": 2}


def invariant_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """`invariant_attention` on a GPU (or, on the CPU, in Triton's interpreter), as ``[B, Q, H, head_dim]``."""
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    out = query.new_empty(batch, queries, heads, head_dim)
    if not out.numel():
        return out
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    mask = query.new_ones(keys, dtype=torch.uint8) if mask is None else mask.view(torch.uint8)
    by_row = mask.dim() > 1 and mask.shape[-2] > 1
    mask = mask.expand(batch, heads, queries, keys)
    tile = tile or tile_of(query.dtype, head_dim, query.device)
    row_tiles = triton.cdiv(queries, tile["BM"])
    invariant_attention_kernel[(row_tiles * heads * batch,)](
        query,
        key,
        value,
        mask,
        out,
        queries,
        keys,
        row_tiles,
        heads,
        heads // key.shape[1],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *mask.stride(),
        scale * LOG2E.value,
        DIM=head_dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        MASK_ROWS=by_row,
        **tile,
    )
    return out
