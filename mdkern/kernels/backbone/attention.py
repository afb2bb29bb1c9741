"""`attention`: every query of a sequence sees all its keys, for a few sequences on a Hopper GPU.

cuDNN gives a program 128 queries, which leaves most of the card idle when there are few. This file has the contract,
the reference in plain PyTorch and the rule by which `dit_fused` chooses; `triton_attention` is the kernel. Times:
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

QUERIES = 64  # of a program
HEAD_DIM = 64  # the kernel's only one
MOST_ROUNDS = 6  # programs for each multiprocessor; above that cuDNN is faster
FEW_ROUNDS, LONG = 2, 1024  # programs for each multiprocessor and keys, for which two programs share the keys out


def attention_reference(query: Tensor, key: Tensor, value: Tensor, arrived: Tensor) -> Tensor:
    """`attention` in plain PyTorch."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


attention_operator = operator(
    attention_reference,
    lambda query, *_: query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3]),
    "mdkern.kernels.backbone.triton_attention:attention",
    mutates=("arrived",),
    name="attention",
)


def tiles_of(batch: int, length: int, heads: int) -> int:
    """Tiles of queries."""
    return batch * heads * -(-length // QUERIES)


def new_arrivals(batch: int, length: int, heads: int, device: torch.device) -> Tensor:
    """What `attention` counts with, for sequences of this shape: zeros, which it leaves as zeros; often none."""
    tiles = tiles_of(batch, length, heads)
    return torch.zeros(tiles if is_divided(tiles, length, device) else 0, dtype=torch.int32, device=device)


def is_divided(tiles: int, length: int, device: torch.device) -> bool:
    """Whether two programs share the keys of a tile of queries."""
    return length >= LONG and tiles <= FEW_ROUNDS * num_sms(device)


def pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` takes such tensors and is the faster way. Its bits depend on the number of sequences, so that
    it is not for the batch-invariant mode."""
    batch, length, heads, head_dim = query.shape
    return (
        is_hopper(query.device)
        and not is_batch_invariant()
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape == key.shape == value.shape
        and head_dim == HEAD_DIM
        and tiles_of(batch, length, heads) <= MOST_ROUNDS * num_sms(query.device)
        and all(map(is_matrix, (query, key, value)))
    )


def is_matrix(x: Tensor) -> bool:
    """Whether ``[B, L, H, head_dim]`` is a matrix ``[B * L, H * head_dim]`` that the bulk-copy engine can read."""
    batch, length, _, head_dim = x.shape
    follow = batch == 1 or x.stride(0) == length * x.stride(1)
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    return x.stride(3) == 1 and x.stride(2) == head_dim and follow and aligned


def attention(query: Tensor, key: Tensor, value: Tensor, arrived: Tensor) -> Tensor:
    """``softmax(query @ key.T / sqrt(head_dim)) @ value`` of each sequence and head (FlashAttention-2, 2307.08691).

    Args:
        query, key, value: bfloat16 or float16 ``[B, L, H, 64]``, as matrices ``[B * L, H * 64]``: `pays` tells.
        arrived: int32, the `new_arrivals` of this shape. Calls that may run at the same time need one each.

    Returns:
        ``[B, L, H * 64]``, contiguous.

    Raises:
        ValueError: shapes that differ, or `arrived` of another shape.
    """
    batch, length, heads, _ = query.shape
    if not query.shape == key.shape == value.shape:
        raise ValueError(
            f"query, key and value must have one shape, not {[list(x.shape) for x in (query, key, value)]}"
        )
    tiles = tiles_of(batch, length, heads)
    wanted = (tiles if is_divided(tiles, length, query.device) else 0,)
    check_tensor("arrived", arrived, wanted, torch.int32, query.device)
    result: Tensor = attention_operator(query, key, value, arrived)
    return result
