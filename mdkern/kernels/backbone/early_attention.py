"""`early_attention`: attention of a few texts, launched before the product that it reads has ended.

With one text of 1,024, or sixteen of 256, attention takes a few microseconds, and the gaps around it tell. This file
has the contract and the reference in plain PyTorch; `triton_early_attention` is the GPU kernel. Measurements:
docs/notes/backbone.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.checks import check_tensor
from mdkern.kernels.device import is_hopper, num_sms
from mdkern.kernels.invariant import is_batch_invariant
from mdkern.kernels.operator import operator

HEAD_DIM = 64
QUERIES = 64  # of a program
MOST_PROGRAMS = 3  # for each multiprocessor; with more, cuDNN is faster


def early_attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`early_attention` in plain PyTorch."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous()


early_attention_operator = operator(
    early_attention_reference,
    lambda query, *_: query.new_empty(query.shape),
    "mdkern.kernels.backbone.triton_early_attention:early_attention",
    name="early_attention",
)


def runs_early(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel is the fast way: few enough programs, heads of 64, on the card that it was measured on."""
    batch, rows, heads, head_dim = query.shape
    return (
        is_hopper(query.device)
        and head_dim == HEAD_DIM
        and query.dtype in (torch.bfloat16, torch.float16)
        and rows >= QUERIES
        and batch * heads * -(-rows // QUERIES) <= MOST_PROGRAMS * num_sms(query.device)
        and query.stride(3) == key.stride(3) == 1
        and not is_batch_invariant()
    )


def early_attention(
    query: Tensor,  # [B, Lq, H, 64]
    key: Tensor,  # [B, L, H, 64]
    value: Tensor,  # [B, L, H, 64]
) -> Tensor:
    """``softmax(query @ key.T / 8) @ value`` of each text and head.

    Args:
        query, key, value: floating, of one dtype, of any strides between positions and heads.

    Returns:
        ``[B, Lq, H, 64]``, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    shape = query.shape
    check_tensor("query", query, shape, query.dtype, query.device)
    if query.ndim != 4 or shape[3] != HEAD_DIM or not query.is_floating_point():
        raise ValueError(f"query must be floating [B, Lq, H, {HEAD_DIM}], not {query.dtype} {list(shape)}")
    for name, part in (("key", key), ("value", value)):
        check_tensor(name, part, (shape[0], key.shape[1], *shape[2:]), query.dtype, query.device)
        if part.stride() != key.stride() or part.stride(3) != 1 or query.stride(3) != 1:
            raise ValueError(f"{name} must have the strides of key, each head together, not {part.stride()}")
    attended: Tensor = early_attention_operator(query, key, value)
    return attended
