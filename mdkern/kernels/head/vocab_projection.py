"""`vocab_projection`: the output layer of a denoiser, from rows of hidden states to tokens and statistics.

This file has the contract that every implementation meets. Callers use this one function. The operator chooses the
implementation by the device: `reference` is plain PyTorch, `launch` runs the GPU kernels, which keep no logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from mdkern.kernels.head import reference
from mdkern.kernels.head.arguments import Filters, Head, Of, Rows, TopPRule, Wanted, empty_outputs
from mdkern.kernels.operator import operator


class RowStatistics(NamedTuple):
    """Token and statistics of each row; statistics that were not asked for are None.

    A row whose logits hold a NaN or +inf, or are all -inf, has token and argmax -1 and NaN in every other field, and so
    have the rows from ``row_count`` on.
    """

    token: Tensor  # int64 [M]
    log_prob: Tensor  # float32 [M], of the token
    logsumexp: Tensor  # float32 [M]
    top1: Tensor | None = None  # float32 [M], largest probability
    top2: Tensor | None = None  # float32 [M], second largest
    entropy: Tensor | None = None  # float32 [M], nats
    argmax: Tensor | None = None  # int64 [M], the most probable id, the lowest of several


_vocab_projection = operator(
    reference.vocab_projection, empty_outputs, kernels="mdkern.kernels.head.launch:vocab_projection"
)


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
    weight_scale: Tensor | None = None,  # [V]
    want_top: bool = False,
    want_entropy: bool = False,
    want_argmax: bool = False,
    of: Of = "model",
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_p_rule: TopPRule = "reach",
) -> RowStatistics:
    """Token and statistics of rows of ``hidden``, from ``logits = cap(scale * hidden @ weight.T) + bias``.

    Args:
        hidden: floating ``[N, D]``, any row stride. With ``weight=None`` its rows are the logits (D = V).
        weight: same dtype, ``[V, D]``; or float8_e4m3fn with a `weight_scale`.
        bias: float32 ``[V]``; ``-inf`` at ids that must never be produced (mask, padding, a user's list).
        row_index: int32 or int64 ``[M]``, rows of `hidden`. On a GPU they are not checked beforehand: a row outside of
            `hidden` gives token -1 and NaN, or PyTorch's device assertion where rows are gathered.
        temperature: float32 ``[M]``. 0 takes the argmax (lowest id on ties); otherwise the token is an exact draw from
            ``softmax(logits / temperature)``. A number is the temperature of all rows.
        seed: int64 scalar tensor.
        keys: int64 ``[M, 3]``: sample number, position and step of each row. The draw is a function of (seed, key, id).
        row_count: int32 or int64 scalar tensor on the device: only the first `row_count` rows are computed. None: all.
        scale, soft_cap: see the formula; ``soft_cap=0`` is no cap.
        weight_scale: float32 ``[V]``, for a weight in float8, which stands for ``weight * weight_scale[:, None]``. The
            rows of `hidden` keep their dtype: results are those of that product, with float32 sums, at any number of
            rows.
        want_top, want_entropy, want_argmax: whether to return ``top1`` and ``top2``, ``entropy``, and ``argmax``.
            ``argmax`` is for rows without filters.
        of: the distribution that all statistics describe. ``"model"``: ``softmax(logits)``, without temperature and
            filters. ``"sampler"``: the one that the token is drawn from, after temperature and filters; where the
            temperature is 0, the filtered distribution at temperature 1 (as Dream's code ranks greedy tokens).
        top_k, top_p, min_p: draw only from the `top_k` most probable ids; of these from the fewest whose probabilities
            sum to `top_p`; of these from the ones that are at least `min_p` times as probable as the most probable. 0,
            1 and 0 leave a filter out. They apply in this order, after the temperature. Of equally probable ids `top_k`
            and `top_p` keep the lowest. Filters need the logits of rows in memory: on a GPU 64 MiB of float32 at a
            time, and at most as much to search in, without sorting or synchronising. `top_p` sums float32
            probabilities. An id at which the sum is within rounding (some 1e-6) of `top_p` may be kept on one device
            and not on another, but this depends only on the row's own logits.
        top_p_rule: ``"reach"``: the fewest ids whose probabilities sum to at least `top_p`. ``"within"``: the most that
            sum to at most `top_p`, and at least one, which leaves out the id that crosses it. This is the nucleus of
            the published code of ReMDM (2503.00307) and BD3-LM (2503.09573), whose values of `top_p` are meant so.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; numbers out of range; on a CPU also values of `row_index`
            and `temperature` that are.
    """
    head, filters = Head(weight, bias, scale, soft_cap, weight_scale), Filters(top_k, top_p, min_p, top_p_rule)
    per_row, uniform = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    rows = Rows(row_index, row_count, per_row, uniform, seed, keys)
    check_head(hidden, head)
    check_rows(hidden, rows)
    filters.check()
    if of not in get_args(Of):
        raise ValueError(f"of must be one of {', '.join(get_args(Of))}, not {of!r}")
    if want_argmax and filters.active():
        raise ValueError(
            "argmax is not computed with top_k, top_p or min_p; filters keep it, so temperature=0 gives it"
        )
    if top_k >= head.vocab(hidden):
        filters = filters._replace(top_k=0)
    token, log_prob, top1, top2, entropy, logsumexp, argmax = _vocab_projection(
        hidden, *head, *rows, *Wanted(want_top, want_entropy, of, want_argmax), *filters
    )
    return RowStatistics(
        token,
        log_prob,
        logsumexp,
        top1 if want_top else None,
        top2 if want_top else None,
        entropy if want_entropy else None,
        argmax if want_argmax else None,
    )


def check_head(hidden: Tensor, head: Head, prefix: str = "") -> None:
    """Refuse an output layer that does not fit its hidden rows. `prefix` is put before the arguments' names."""
    weight, bias, scale, soft_cap, weight_scale = head
    if not hidden.is_floating_point() or hidden.ndim != 2 or hidden.is_meta:
        raise ValueError(f"{prefix}hidden must be floating [N, D] with values, not {describe(hidden)}")
    own = hidden.dtype if weight_scale is None else torch.float8_e4m3fn
    if weight is not None and (
        weight.ndim != 2 or weight.dtype != own or weight.shape[1] != hidden.shape[1] or weight.device != hidden.device
    ):
        needed = ""
        if weight.dtype == torch.float8_e4m3fn and weight_scale is None:
            needed = f": a weight in float8 needs {prefix}weight_scale"
        elif weight_scale is not None and weight.dtype != own:
            needed = f": {prefix}weight_scale is for a weight in float8_e4m3fn"
        raise ValueError(f"{prefix}weight {describe(weight)} does not fit {prefix}hidden {describe(hidden)}{needed}")
    if weight is None and weight_scale is not None:
        raise ValueError(f"{prefix}weight_scale needs a weight in float8_e4m3fn, and there is no weight")
    check_tensor(f"{prefix}weight_scale", weight_scale, (torch.float32,), (head.vocab(hidden),), hidden.device)
    check_tensor(f"{prefix}bias", bias, (torch.float32,), (head.vocab(hidden),), hidden.device)
    if not math.isfinite(scale) or not (math.isfinite(soft_cap) and soft_cap >= 0.0):
        raise ValueError(
            f"{prefix}scale must be finite and {prefix}soft_cap at least 0 and finite, not {scale} and {soft_cap}"
        )


def check_rows(hidden: Tensor, rows: Rows) -> None:
    """Refuse rows whose tensors do not fit. Their values are not read, as that would synchronise on a GPU."""
    whole, device = (torch.int32, torch.int64), hidden.device
    capacity = (rows.row_index.shape[0],) if rows.row_index.ndim == 1 else ("M",)
    check_tensor("row_index", rows.row_index, whole, capacity, device)
    check_tensor("row_count", rows.row_count, whole, (), device)
    check_tensor("temperature", rows.temperature, (torch.float32,), capacity, device)
    check_tensor("seed", rows.seed, (torch.int64,), (), device)
    check_tensor("keys", rows.keys, (torch.int64,), (*capacity, 3), device)
    if not 0.0 <= rows.uniform_temperature <= torch.finfo(torch.float32).max:
        raise ValueError(f"temperature must be a float32 of at least 0, not {rows.uniform_temperature}")


def check_tensor(
    name: str,
    tensor: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    device: torch.device,
) -> None:
    """Refuse a tensor of another dtype, shape or device. None is accepted."""
    if tensor is None or (tensor.dtype in dtypes and tuple(tensor.shape) == shape and tensor.device == device):
        return
    wanted = f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} {list(shape)} on {device}"
    raise ValueError(f"{name} must be {wanted}, not {describe(tensor)}")


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
