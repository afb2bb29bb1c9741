"""`vocab_projection`: the output layer of a denoiser, from hidden rows to tokens and statistics, no logits kept.

The contract that every implementation (plain PyTorch, kernels) meets. Callers use this one function; which
implementation runs is decided by device, through `torch.library`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdkern.kernels import reference


class RowStatistics(NamedTuple):
    """Per row; the fields not asked for are None. Rows at and past ``row_count`` hold token -1 and NaN."""

    token: Tensor  # int64 [M]; -1: the row's logits hold a NaN or +inf, or nothing above -inf
    log_prob: Tensor  # float32 [M], of the token, at temperature 1
    logsumexp: Tensor  # float32 [M]
    top1: Tensor | None = None  # float32 [M], largest probability
    top2: Tensor | None = None  # float32 [M], second largest
    entropy: Tensor | None = None  # float32 [M], nats


@torch.library.custom_op("mdkern::vocab_projection", mutates_args=())
def _vocab_projection(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor,
    row_count: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    keys: Tensor,
    scale: float,
    soft_cap: float,
    want_top: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.vocab_projection(
        hidden, weight, bias, row_index, row_count, temperature, seed, keys, scale, soft_cap, want_top, want_entropy
    )


@_vocab_projection.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor,
    row_count: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    keys: Tensor,
    scale: float,
    soft_cap: float,
    want_top: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = row_index.shape[0]

    def statistic(wanted: bool = True) -> Tensor:
        return hidden.new_empty(rows if wanted else 0, dtype=torch.float32)

    token = hidden.new_empty(rows, dtype=torch.int64)
    return token, statistic(), statistic(want_top), statistic(want_top), statistic(want_entropy), statistic()


def vocab_projection(
    hidden: Tensor,  # [N, D]
    weight: Tensor | None,  # [V, D]
    bias: Tensor | None,  # [V]
    row_index: Tensor,  # [M]
    temperature: Tensor,  # [M]
    seed: Tensor,  # []
    keys: Tensor,  # [M, 3]
    *,
    row_count: Tensor | None = None,  # []
    scale: float = 1.0,
    soft_cap: float = 0.0,
    want_top: bool = False,
    want_entropy: bool = False,
) -> RowStatistics:
    """Token and statistics of the rows ``row_index`` of ``hidden``, from ``logits = cap(scale * hidden @ weight.T) + bias``.

    Args:
        hidden: floating ``[N, D]``, any row stride. With ``weight=None`` its rows are the logits (D = V).
        weight: same dtype, ``[V, D]``.
        bias: float32 ``[V]``; ``-inf`` at ids that must never be produced (mask, padding, a user's list).
        row_index: int32 or int64 ``[M]``, rows of `hidden`.
        temperature: float32 ``[M]``: 0 takes the argmax (lowest id on ties), else the token is an exact draw from
            ``softmax(logits / temperature)``. Statistics are of ``softmax(logits)`` whatever the temperature.
        seed: int64 scalar tensor.
        keys: int64 ``[M, 3]``: sample number, position and step of each row. The draw is a function of (seed, key, id).
        row_count: int32 or int64 scalar tensor on the device: only the first `row_count` rows are computed. None: all.
        scale, soft_cap: see the formula; ``soft_cap=0`` is none.
        want_top, want_entropy: whether to return ``top1`` and ``top2``, ``entropy``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if weight is not None and (weight.dtype != hidden.dtype or weight.shape[1] != hidden.shape[-1]):
        raise ValueError(
            f"weight {weight.dtype} {tuple(weight.shape)} does not fit hidden {hidden.dtype} {tuple(hidden.shape)}"
        )
    columns = hidden.shape[-1] if weight is None else weight.shape[0]
    if not hidden.is_floating_point() or hidden.ndim != 2:
        raise ValueError(f"hidden must be floating [N, D], not {hidden.dtype} {tuple(hidden.shape)}")
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (columns,)):
        raise ValueError(f"bias must be float32 [{columns}], not {bias.dtype} {tuple(bias.shape)}")
    rows = row_index.shape[0]
    if tuple(keys.shape) != (rows, 3) or tuple(temperature.shape) != (rows,):
        raise ValueError(
            f"keys {tuple(keys.shape)} and temperature {tuple(temperature.shape)} do not fit {rows} rows: "
            f"expected ({rows}, 3) and ({rows},)"
        )
    token, log_prob, top1, top2, entropy, logsumexp = _vocab_projection(
        hidden, weight, bias, row_index, row_count, temperature, seed, keys, scale, soft_cap, want_top, want_entropy
    )
    return RowStatistics(
        token,
        log_prob,
        logsumexp,
        top1 if want_top else None,
        top2 if want_top else None,
        entropy if want_entropy else None,
    )
