"""`divergence`: how far one output layer's distribution is from another's, row by row, in bounded memory.

For the importance of a step: KL(heavy || light) over 50k-wide rows. The contract, and plain PyTorch for some rows at a
time; `triton_divergence` runs it on a GPU, both heads in one pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.kernels.device import has_triton
from mdkern.kernels.head import reference


class RowDivergence(NamedTuple):
    """Per row, in nats."""

    kl: Tensor  # float32 [M], KL(p || q)
    cross_entropy: Tensor  # float32 [M], -sum p log q


@torch.library.custom_op("mdkern::divergence", mutates_args=())
def _divergence(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float,
    other_hidden: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_scale: float,
    other_soft_cap: float,
    row_index: Tensor,
) -> tuple[Tensor, Tensor]:
    return in_pytorch(
        hidden,
        weight,
        bias,
        scale,
        soft_cap,
        other_hidden,
        other_weight,
        other_bias,
        other_scale,
        other_soft_cap,
        row_index,
    )


def in_pytorch(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float,
    other_hidden: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_scale: float,
    other_soft_cap: float,
    row_index: Tensor,
) -> tuple[Tensor, Tensor]:
    """The operator with the log-probabilities in memory, `reference.CHUNK_ELEMENTS` of each head's at a time."""
    columns = hidden.shape[1] if weight is None else weight.shape[0]
    chunk = max(1, reference.CHUNK_ELEMENTS // max(1, columns))
    kl = torch.empty(row_index.shape[0], dtype=torch.float32, device=hidden.device)
    cross_entropy = torch.empty_like(kl)
    for start in range(0, len(kl), chunk):
        rows = slice(start, start + chunk)
        log_p = log_probability(hidden[row_index[rows]], weight, bias, scale, soft_cap)
        log_q = log_probability(other_hidden[row_index[rows]], other_weight, other_bias, other_scale, other_soft_cap)
        p = log_p.exp()
        impossible = p == 0  # 0 * -inf is 0 here
        kl[rows] = (p * (log_p - log_q).masked_fill(impossible, 0.0)).sum(-1)
        cross_entropy[rows] = -(p * log_q.masked_fill(impossible, 0.0)).sum(-1)
    return kl, cross_entropy


@_divergence.register_kernel("cuda")
def _on_gpu(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if not has_triton(hidden.device):
        return in_pytorch(hidden, *arguments)
    from mdkern.kernels.head import launch_divergence  # imports Triton, which is no business of a machine without a GPU

    return launch_divergence.divergence(hidden, *arguments)


@_divergence.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float,
    other_hidden: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_scale: float,
    other_soft_cap: float,
    row_index: Tensor,
) -> tuple[Tensor, Tensor]:
    kl = hidden.new_empty(row_index.shape[0], dtype=torch.float32)
    return kl, torch.empty_like(kl)


def log_probability(states: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, cap: float) -> Tensor:
    product = states if weight is None else reference.product_float32(states, weight)
    return reference.finish_logits(product, bias, scale, cap).log_softmax(-1)


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
) -> RowDivergence:
    """KL divergence and cross-entropy of the second head's distribution q from the first head's p, at some rows.

    Args:
        hidden, weight, bias, scale, soft_cap: the head of p, as in `vocab_projection`.
        other_hidden, other_weight, other_bias, other_scale, other_soft_cap: the head of q; its depth may differ.
        row_index: int32 or int64 ``[M]``, rows of both `hidden` and `other_hidden`.

    Raises:
        ValueError: vocabularies that differ.
    """
    columns = [h.shape[1] if w is None else w.shape[0] for h, w in ((hidden, weight), (other_hidden, other_weight))]
    if columns[0] != columns[1]:
        raise ValueError(f"the heads have vocabularies of {columns[0]} and {columns[1]} ids; they must be the same")
    p, q = (
        (hidden, weight, bias, scale, soft_cap),
        (other_hidden, other_weight, other_bias, other_scale, other_soft_cap),
    )
    return RowDivergence(*_divergence(*p, *q, row_index))
