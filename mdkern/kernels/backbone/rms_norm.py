"""`rms_norm`, `gathered_rms_norm`: a Llama's residual addition and the norm after it, in one pass over the rows.

`scaled_rms_norm` and `gathered_scaled_rms_norm` give the norm in e4m3 (`mdkern.kernels.backbone.quantise`). Root mean
square normalisation is that of Zhang and Sennrich (1910.07467). This file has the contracts and the references in plain
PyTorch; `triton_rms_norm` has the GPU kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import gathered_norm_outputs, wide
from mdkern.kernels.backbone.quantise import quantise_rows_reference
from mdkern.kernels.backbone.scaled_linear import Scaled, new_scaled
from mdkern.kernels.checks import check_tensor, check_written
from mdkern.kernels.operator import operator


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, update: Tensor | None) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    if update is not None:
        x.copy_(x.to(wide(x)) + (update if update.ndim == 2 else update.sum(0, dtype=wide(x))))
    return normalise(x, weight, eps)


def gathered_rms_norm_reference(table: Tensor, row_index: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`gathered_rms_norm` in plain PyTorch."""
    outside = (row_index < 0) | (row_index >= table.shape[0])
    x = table[row_index.masked_fill(outside, 0)].masked_fill(outside[:, None], torch.nan)
    return x, normalise(x, weight, eps)


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normalised(x, weight, eps).to(x.dtype)


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm, not rounded."""
    rows = x.to(wide(x))
    return rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide(x))


def scaled_rms_norm_reference(x: Tensor, weight: Tensor, eps: float, update: Tensor | None) -> tuple[Tensor, Tensor]:
    """`scaled_rms_norm` in plain PyTorch."""
    rms_norm_reference(x, weight, eps, update)
    return quantise_rows_reference(normalised(x, weight, eps))


def gathered_scaled_rms_norm_reference(
    table: Tensor, row_index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`gathered_scaled_rms_norm` in plain PyTorch."""
    x, _ = gathered_rms_norm_reference(table, row_index, weight, eps)
    return x, *quantise_rows_reference(normalised(x, weight, eps))


def gathered_scaled_outputs(table: Tensor, row_index: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    x = table.new_empty(row_index.shape[0], table.shape[1])
    return x, *new_scaled(x)


KERNELS = "mdkern.kernels.backbone.triton_rms_norm"
rms_norm_operator = operator(
    rms_norm_reference, lambda x, *_: torch.empty_like(x), f"{KERNELS}:rms_norm", mutates=("x",), name="rms_norm"
)
gathered_rms_norm_operator = operator(
    gathered_rms_norm_reference, gathered_norm_outputs, f"{KERNELS}:gathered_rms_norm", name="gathered_rms_norm"
)
scaled_rms_norm_operator = operator(
    scaled_rms_norm_reference, new_scaled, f"{KERNELS}:scaled_rms_norm", mutates=("x",), name="scaled_rms_norm"
)
gathered_scaled_rms_norm_operator = operator(
    gathered_scaled_rms_norm_reference,
    gathered_scaled_outputs,
    f"{KERNELS}:gathered_scaled_rms_norm",
    name="gathered_scaled_rms_norm",
)


def rms_norm(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [D]
    eps: float,
    *,
    update: Tensor | None = None,  # [N, D] or [P, N, D]
) -> Tensor:
    """``x += update`` in place, then ``x / sqrt(mean(x**2) + eps) * weight``.

    Everything is computed in float32; the norm is of the updated `x` as it is stored.

    Args:
        x: floating ``[N, D]``, contiguous: the residual stream. Written only if there is an `update`.
        weight: floating ``[D]``.
        update: shape and dtype of `x`, any row stride: the output of the sublayer before. Or parts of it as by
            `skinny_parts` and `joint_parts`, ``[P, N, D]`` with each row contiguous, whose sum it is: float32 (float64
            for float64), or of the dtype of `x`. With these the kernel may begin before the one before it on its stream
            has ended, which must not write `weight`.

    Returns:
        ``[N, D]`` of the dtype of `x`: the input of the next sublayer.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_stream(x, weight, update)
    normed: Tensor = rms_norm_operator(x, weight, eps, update)
    return normed


def scaled_rms_norm(x: Tensor, weight: Tensor, eps: float, *, update: Tensor | None = None) -> Scaled:
    """`rms_norm` whose result is rounded once, to e4m3 as by `quantise_rows`."""
    check_stream(x, weight, update)
    return Scaled(*scaled_rms_norm_operator(x, weight, eps, update))


def gathered_rms_norm(
    table: Tensor,  # [T, D]
    row_index: Tensor,  # [N]
    weight: Tensor,  # [D]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``x = table[row_index]``, and its norm as by `rms_norm`: for an embedding, or for some rows only.

    Args:
        table: floating ``[T, D]``, any row stride.
        row_index: int32 or int64 ``[N]``. An index outside 0..T-1 gives a row of NaN.
        weight: floating ``[D]``.

    Returns:
        x and its norm, ``[N, D]`` of the dtype of `table`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_tensor("row_index", row_index, (row_index.numel(),), (torch.int64, torch.int32), table.device)
    check_rows(table, weight)
    x, normed = gathered_rms_norm_operator(table, row_index, weight, eps)
    return x, normed


def gathered_scaled_rms_norm(table: Tensor, row_index: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Scaled]:
    """`gathered_rms_norm` whose norm is rounded once, to e4m3 as by `quantise_rows`."""
    check_tensor("row_index", row_index, (row_index.numel(),), (torch.int64, torch.int32), table.device)
    check_rows(table, weight)
    x, *normed = gathered_scaled_rms_norm_operator(table, row_index, weight, eps)
    return x, Scaled(*normed)


def check_stream(x: Tensor, weight: Tensor, update: Tensor | None) -> None:
    check_rows(x, weight)
    check_written("x", x)
    if update is not None and update.ndim == 3:
        check_tensor("update", update, (len(update), *x.shape), (wide(x), x.dtype), x.device)
        if not len(update) or update.stride(-1) != 1:
            raise ValueError(
                f"rows of the parts of an update must be contiguous, not {list(update.shape)}, {update.stride()}"
            )
    else:
        check_tensor("update", update, x.shape, x.dtype, x.device)


def check_rows(x: Tensor, weight: Tensor) -> None:
    check_tensor("x", x, x.shape, x.dtype, x.device)
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"rows must be floating [N, D], not {x.dtype} {list(x.shape)}")
    check_tensor("weight", weight, (x.shape[1],), weight.dtype, x.device)
