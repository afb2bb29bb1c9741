"""`divergence`: KL divergence and cross-entropy of two output layers' distributions, row by row, in bounded memory.

It measures at which steps the heavy model is needed (`mdkern.evaluation.importance`). This file has the contract;
`reference` has it in plain PyTorch, and `triton_divergence` is the GPU kernel, which runs both heads in one pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdkern.kernels.head import reference
from mdkern.kernels.head.arguments import Head
from mdkern.kernels.head.vocab_projection import check_head, check_tensor
from mdkern.kernels.operator import operator


class RowDivergence(NamedTuple):
    """Per row, in nats."""

    kl: Tensor  # float32 [M], KL(p || q)
    cross_entropy: Tensor  # float32 [M], -sum p log q


def empty_outputs(
    hidden: Tensor, head: Head, other_hidden: Tensor, other: Head, row_index: Tensor
) -> tuple[Tensor, Tensor]:
    kl = hidden.new_empty(row_index.shape[0], dtype=torch.float32)
    return kl, torch.empty_like(kl)


_divergence = operator(reference.divergence, empty_outputs, kernels="mdkern.kernels.head.launch_divergence:divergence")


def divergence(
    hidden: Tensor,  # [N, D]
    weight: Tensor | None,  # [V, D]
    bias: Tensor | None,  # [V]
    other_hidden: Tensor,  # [N, D']
    other_weight: Tensor | None,  # [V, D']
    other_bias: Tensor | None,  # [V]
    row_index: Tensor,  # [M]
    *,
    scale: float = 1.0,
    soft_cap: float = 0.0,
    other_scale: float = 1.0,
    other_soft_cap: float = 0.0,
    weight_scale: Tensor | None = None,  # [V]
    other_weight_scale: Tensor | None = None,  # [V]
) -> RowDivergence:
    """KL(p || q) and cross-entropy of the first head's distribution p and the second head's q, at some rows.

    Args:
        hidden, weight, bias, scale, soft_cap, weight_scale: the head of p, as in `vocab_projection`.
        other_hidden, other_weight, other_bias, other_scale, other_soft_cap, other_weight_scale: the head of q; its
            width D' may differ.
        row_index: int32 or int64 ``[M]``, rows of both `hidden` and `other_hidden`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; different vocabularies; on a CPU also rows outside of
            `hidden`.
    """
    head = Head(weight, bias, scale, soft_cap, weight_scale)
    other = Head(other_weight, other_bias, other_scale, other_soft_cap, other_weight_scale)
    check_head(hidden, head)
    check_head(other_hidden, other, "other_")
    vocab, other_vocab = head.vocab(hidden), other.vocab(other_hidden)
    if vocab != other_vocab:
        raise ValueError(f"the heads have vocabularies of {vocab} and {other_vocab} ids; they must be the same")
    if other_hidden.device != hidden.device or other_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"other_hidden must have as many rows as hidden, on {hidden.device}: {hidden.shape[0]}, "
            f"not {other_hidden.shape[0]} on {other_hidden.device}"
        )
    check_tensor("row_index", row_index, (torch.int32, torch.int64), (row_index.numel(),), hidden.device)
    return RowDivergence(*_divergence(hidden, *head, other_hidden, *other, row_index))
