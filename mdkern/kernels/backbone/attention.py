"""`attention`: attention of a Hopper GPU's own, for few sequences and many, and for any in the batch-invariant mode.

cuDNN gives a program 128 queries, which leaves most of the card idle when there are few: `triton_attention` gives it
64, and runs the batch-invariant mode, too. For many `hopper_attention` gives it 256, with a producer warp and four
warpgroups, where these fill the card. This file has the contract, the reference in plain PyTorch and the rule by which
`dit_fused` and the launch choose. Times: docs/notes/backbone.md.
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
HEAD_DIM = 64  # the kernels' only one
MOST_ROUNDS = 6  # programs for each multiprocessor; as many as were timed, and faster than cuDNN
FEW_ROUNDS, LONG = 2, 1024  # programs for each multiprocessor and keys, for which two programs share the keys out
GROUPS = 4  # of QUERIES, in a program for many sequences
FULL = 0.9  # share of the places for queries on the card that such programs must fill, as measured against cuDNN


def attention_reference(query: Tensor, key: Tensor, value: Tensor, arrived: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` in plain PyTorch."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    seen = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)


attention_operator = operator(
    attention_reference,
    lambda query, *_: query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3]),
    "mdkern.kernels.backbone.launch_attention:attention",
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
    return length >= LONG and tiles <= FEW_ROUNDS * num_sms(device) and not is_batch_invariant()


def pays(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attention` takes such tensors and is the faster way.

    In the batch-invariant mode that does not depend on how many sequences, queries and keys there are.
    """
    batch, length, heads, head_dim = query.shape
    fits = is_hopper(query.device) and query.dtype in (torch.bfloat16, torch.float16) and head_dim == HEAD_DIM
    if not fits or key.shape[2] != heads or not all(map(is_matrix, (query, key, value))):
        return False
    few = tiles_of(batch, length, heads) <= MOST_ROUNDS * num_sms(query.device)
    many = takes_many(batch, length, heads, query.device)
    return is_batch_invariant() or (is_whole(query, key, mask) and (few or many))


def is_whole(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether all queries of a sequence are there, and see all of its keys."""
    return mask is None and query.shape == key.shape


def takes_many(batch: int, length: int, heads: int, device: torch.device) -> bool:
    """Whether whole sequences fill the programs of the kernel for many, which then runs.

    A multiprocessor has one program at a time, of ``GROUPS * QUERIES`` queries of a sequence and head.
    """
    if not is_hopper(device) or is_batch_invariant():
        return False
    most, places = num_sms(device), GROUPS * QUERIES
    tiles = batch * heads * -(-length // places)
    rounds = -(-tiles // most)
    return batch * heads * length >= FULL * max(1, rounds) * most * places


def is_matrix(x: Tensor) -> bool:
    """Whether ``[B, L, H, head_dim]`` is a matrix ``[B * L, H * head_dim]`` that the bulk-copy engine can read."""
    batch, length, _, head_dim = x.shape
    follow = batch == 1 or x.stride(0) == length * x.stride(1)
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    return x.stride(3) == 1 and x.stride(2) == head_dim and follow and aligned


def attention(query: Tensor, key: Tensor, value: Tensor, arrived: Tensor, mask: Tensor | None = None) -> Tensor:
    """``softmax(query @ key.T / sqrt(head_dim)) @ value`` of each sequence and head (FlashAttention-2, 2307.08691).

    In the batch-invariant mode the bits of a row depend on its query and on the keys and values that it sees, with
    their columns, as the keys are added up in tiles counted from column 0.

    Args:
        query: bfloat16 or float16 ``[B, Q, H, 64]``, as a matrix ``[B * Q, H * 64]``: `pays` tells.
        key, value: the same, ``[B, L, H, 64]``.
        arrived: int32, the `new_arrivals` of Q = L. Calls that may run at the same time need one each. Empty, or with a
            mask or fewer queries not used.
        mask: bool ``[B, L]``, True at the keys that a sequence sees; None: all.

    Returns:
        ``[B, Q, H * 64]``, contiguous. On a GPU a query that sees nothing gives 0.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    (batch, queries, heads, head_dim), length = query.shape, key.shape[1]
    if key.shape != (batch, length, heads, head_dim) or key.shape != value.shape:
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"query, key and value must be [B, Q, H, D] and twice [B, L, H, D], not {shapes}")
    check_tensor("mask", mask, (batch, length), torch.bool, query.device)
    if mask is not None or queries != length:
        arrived = arrived[:0]
    tiles = tiles_of(batch, length, heads)
    check_tensor("arrived", arrived, (tiles if len(arrived) else 0,), torch.int32, query.device)
    result: Tensor = attention_operator(query, key, value, arrived, mask)
    return result
