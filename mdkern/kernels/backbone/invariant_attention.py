"""`invariant_attention`: attention whose rows depend on what they see and on nothing else in the batch.

This file has the contract and the reference in plain PyTorch; `triton_invariant_attention` is the GPU kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.operator import operator

LARGEST_HEAD = 256


def invariant_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """`invariant_attention` in plain PyTorch; the result is ``[B, Q, H, head_dim]``."""
    grouped = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return attended.transpose(1, 2).contiguous()


invariant_attention_operator = operator(
    invariant_attention_reference,
    lambda query, *_: query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]),
    "mdkern.kernels.backbone.triton_invariant_attention:invariant_attention",
    name="invariant_attention",
)


def invariant_attention(
    query: Tensor,  # [B, H, Q, head_dim]
    key: Tensor,  # [B, H / n, K, head_dim]
    value: Tensor,  # [B, H / n, K, head_dim]
    attn_mask: Tensor | None = None,  # [B, H, Q, K]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale * query @ key.T) @ value``, with the arguments of PyTorch's `scaled_dot_product_attention`.

    On a GPU the keys are added up in tiles counted from column 0, so the bits of a row depend on its query, and on the
    keys and values that it sees with their columns. Columns after them that it does not see change nothing. On the CPU
    it is PyTorch's attention.

    Args:
        query, key, value: floating, with strides of any size before the last dimension.
        attn_mask: bool, True where a query sees a key, and broadcastable to ``[B, H, Q, K]``; None: it sees all. A
            query that sees nothing gives 0 on a GPU.
        dropout_p, is_causal: must be 0 and False.
        scale: default ``1 / sqrt(head_dim)``; above 0.
        enable_gqa: whether there may be fewer heads of keys and values than of queries.

    Returns:
        ``[B, H, Q, head_dim]``.

    Raises:
        ValueError: arguments that do not fit or that the kernel does not know.
    """
    head_dim, heads = query.shape[-1], key.shape[1]
    if dropout_p or is_causal:
        raise ValueError("dropout_p and is_causal must be 0 and False: batch-invariant attention takes a mask")
    if query.ndim != 4 or key.shape != value.shape or key.shape[-1] != head_dim or key.shape[0] != query.shape[0]:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} must be [B, H, Q, D] and"
            " twice [B, H, K, D]"
        )
    if query.shape[1] % heads or (query.shape[1] != heads and not enable_gqa):
        raise ValueError(f"{query.shape[1]} heads of queries do not fit {heads} of keys")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise ValueError(f"attn_mask must be bool, not {attn_mask.dtype}")
    if query.is_cuda and head_dim > LARGEST_HEAD:
        raise ValueError(f"heads of at most {LARGEST_HEAD} columns have batch-invariant attention, not of {head_dim}")
    if query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"query must be bfloat16, float16 or float32 on a GPU, not {query.dtype}")
    scale = head_dim**-0.5 if scale is None else scale
    attended: Tensor = invariant_attention_operator(query, key, value, attn_mask, scale)
    return attended.transpose(1, 2)
