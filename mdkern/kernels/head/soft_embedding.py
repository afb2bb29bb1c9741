"""`soft_embedding`: the expected embedding under a row's distribution, ``softmax(logits / T) @ table``, without logits.

A model with self-conditioning is given what it believed at the step before in this form (Chen et al., "Analog bits",
2208.04202; DiffusionGemma). This file has the contract; `reference` has it in plain PyTorch, and `launch_soft` runs the
GPU kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.head import reference
from mdkern.kernels.head.arguments import Head
from mdkern.kernels.head.vocab_projection import check_head, check_tensor, describe
from mdkern.kernels.operator import operator


def empty_output(
    hidden: Tensor,
    head: Head,
    table: Tensor | None,
    logsumexp: Tensor,
    temperature: Tensor | None,
    uniform_temperature: float,
) -> Tensor:
    embedding = head.weight if table is None else table
    assert embedding is not None
    return embedding.new_empty(hidden.shape[0], embedding.shape[1])


_soft_embedding = operator(
    reference.soft_embedding, empty_output, kernels="mdkern.kernels.head.launch_soft:soft_embedding"
)


def soft_embedding(
    hidden: Tensor,  # [M, D]
    weight: Tensor | None,  # [V, D]
    bias: Tensor | None,  # [V]
    logsumexp: Tensor,  # [M]
    temperature: Tensor | float,  # [M]
    table: Tensor | None = None,  # [V, E]
    *,
    scale: float = 1.0,
    soft_cap: float = 0.0,
    weight_scale: Tensor | None = None,  # [V]
) -> Tensor:
    """``exp(logits / temperature - logsumexp) @ table`` for each row, with ``logits = cap(scale * hidden @ weight.T) +
    bias``.

    The logits are computed anew, a part of the vocabulary at a time, and their exponentials rounded to the dtype of
    `table`, as a product of probabilities in that dtype has them. Memory is bounded: 180 MiB in 16 bits.

    Args:
        hidden: floating ``[M, D]``, any row stride. With ``weight=None`` its rows are the logits (D = V).
        weight: same dtype, ``[V, D]``; or float8_e4m3fn with a `weight_scale`.
        bias: float32 ``[V]``.
        logsumexp: float32 ``[M]``, of ``logits / temperature``: what ``vocab_projection(of="sampler")`` returns. Rows
            for which it is NaN give NaN.
        temperature: float32 ``[M]``, or a number for all rows. 0 stands for 1, as in ``vocab_projection``.
        table: same dtype as `hidden`, ``[V, E]``. None: `weight`, for tied embeddings, unless it is in float8.
        scale, soft_cap: see the formula; ``soft_cap=0`` is no cap.
        weight_scale: as in `vocab_projection`.

    Returns:
        ``[M, E]`` of the dtype of `table`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; numbers out of range.
    """
    head = Head(weight, bias, scale, soft_cap, weight_scale)
    check_head(hidden, head)
    per_row, uniform = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    check_tensor("logsumexp", logsumexp, (torch.float32,), (hidden.shape[0],), hidden.device)
    check_tensor("temperature", per_row, (torch.float32,), (hidden.shape[0],), hidden.device)
    if not 0.0 <= uniform <= torch.finfo(torch.float32).max:
        raise ValueError(f"temperature must be a float32 of at least 0, not {uniform}")
    if table is None and weight is None:
        raise ValueError("table is needed where the rows are logits: there is no weight that could be the embedding")
    if table is None and weight_scale is not None:
        raise ValueError("table is needed beside a weight in float8: the embedding of a tied model stays as it is")
    fits = table is None or (
        table.ndim == 2
        and table.shape[0] == head.vocab(hidden)
        and table.dtype == hidden.dtype
        and table.device == hidden.device
    )
    if table is not None and not fits:
        raise ValueError(
            f"table must be [{head.vocab(hidden)}, E] of the dtype and on the device of hidden, {hidden.dtype} on "
            f"{hidden.device}, not {describe(table)}"
        )
    soft: Tensor = _soft_embedding(hidden, *head, table, logsumexp, per_row, uniform)
    return soft
