"""`vocab_projection`: the output layer of a denoiser, from hidden rows to tokens and statistics, no logits kept.

The contract that every implementation (plain PyTorch, kernels) meets. Callers use this one function; which
implementation runs is decided by device, through `torch.library`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.kernels.device import has_triton
from mdkern.kernels.head import reference

NO_FILTERS = (0, 1.0, 0.0)  # top_k, top_p, min_p


class RowStatistics(NamedTuple):
    """Per row; the fields not asked for are None.

    A row whose logits hold a NaN or +inf, or nothing above -inf, has token -1 and NaN in every other field, and so have
    the rows at and past ``row_count``.
    """

    token: Tensor  # int64 [M]
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
    temperature: Tensor | None,
    uniform_temperature: float,
    seed: Tensor,
    keys: Tensor,
    scale: float,
    soft_cap: float,
    want_top: bool,
    want_entropy: bool,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.vocab_projection(
        hidden,
        weight,
        bias,
        row_index,
        row_count,
        temperature,
        uniform_temperature,
        seed,
        keys,
        scale,
        soft_cap,
        want_top,
        want_entropy,
        top_k,
        top_p,
        min_p,
    )


@_vocab_projection.register_kernel("cuda")
def _on_gpu(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments, filters = arguments[:12], arguments[12:]
    filters += NO_FILTERS[len(filters) :]  # PyTorch leaves out trailing arguments that are the defaults
    if not has_triton(hidden.device):
        return reference.vocab_projection(hidden, *arguments, *filters)
    # They import Triton, which is no business of a machine without a GPU.
    from mdkern.kernels.head import launch, launch_filter

    if filters == NO_FILTERS:
        return launch.vocab_projection(hidden, *arguments)
    return launch_filter.vocab_projection(hidden, *arguments, *filters)


@_vocab_projection.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor,
    row_count: Tensor | None,
    temperature: Tensor | None,
    uniform_temperature: float,
    seed: Tensor,
    keys: Tensor,
    scale: float,
    soft_cap: float,
    want_top: bool,
    want_entropy: bool,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
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
    temperature: Tensor | float,  # [M]
    seed: Tensor,  # []
    keys: Tensor,  # [M, 3]
    *,
    row_count: Tensor | None = None,  # []
    scale: float = 1.0,
    soft_cap: float = 0.0,
    want_top: bool = False,
    want_entropy: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> RowStatistics:
    """Token and statistics of rows of ``hidden``, from ``logits = cap(scale * hidden @ weight.T) + bias``.

    Args:
        hidden: floating ``[N, D]``, any row stride. With ``weight=None`` its rows are the logits (D = V).
        weight: same dtype, ``[V, D]``.
        bias: float32 ``[V]``; ``-inf`` at ids that must never be produced (mask, padding, a user's list).
        row_index: int32 or int64 ``[M]``, rows of `hidden`.
        temperature: float32 ``[M]``: 0 takes the argmax (lowest id on ties), else the token is an exact draw from
            ``softmax(logits / temperature)``. Statistics are of ``softmax(logits)`` whatever the temperature. A number
            is the temperature of every row.
        seed: int64 scalar tensor.
        keys: int64 ``[M, 3]``: sample number, position and step of each row. The draw is a function of (seed, key, id).
        row_count: int32 or int64 scalar tensor on the device: only the first `row_count` rows are computed. None: all.
        scale, soft_cap: see the formula; ``soft_cap=0`` is none.
        want_top, want_entropy: whether to return ``top1`` and ``top2``, ``entropy``.
        top_k, top_p, min_p: draw only among the `top_k` most probable ids, of these the fewest whose probabilities sum
            to `top_p`, of these the ones at least `min_p` times as probable as the first; 0, 1 and 0 are none. They
            apply in this order, after the temperature, and ids as probable as the last one kept are kept too. The
            statistics do not see them. They need the rows' logits at hand: on a GPU 64 MiB of float32 at a time and as
            much at most to search in, no sort, no synchronisation. `top_p` sums float32 probabilities: an id where the
            sum is within rounding of it (some 1e-6) may be kept on one device and not on another, but whether it is
            does not depend on the other rows, given the row's logits.

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
    shape = tuple(temperature.shape) if isinstance(temperature, Tensor) else (rows,)
    if tuple(keys.shape) != (rows, 3) or shape != (rows,):
        raise ValueError(
            f"keys {tuple(keys.shape)} and temperature {shape} do not fit {rows} rows: "
            f"expected ({rows}, 3) and ({rows},)"
        )
    per_row, uniform = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    if top_k < 0 or not 0.0 < top_p <= 1.0 or not 0.0 <= min_p <= 1.0:
        raise ValueError(
            f"top_k must be at least 0, top_p in (0, 1] and min_p in [0, 1], not {top_k}, {top_p} and {min_p}"
        )
    token, log_prob, top1, top2, entropy, logsumexp = _vocab_projection(
        hidden,
        weight,
        bias,
        row_index,
        row_count,
        per_row,
        uniform,
        seed,
        keys,
        scale,
        soft_cap,
        want_top,
        want_entropy,
        top_k if top_k < columns else 0,
        top_p,
        min_p,
    )
    return RowStatistics(
        token,
        log_prob,
        logsumexp,
        top1 if want_top else None,
        top2 if want_top else None,
        entropy if want_entropy else None,
    )
