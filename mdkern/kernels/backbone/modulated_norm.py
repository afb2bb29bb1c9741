"""`modulated_norm`, `gathered_norm`: what stands between two matrix products of an adaLN transformer, in one pass.

The gated residual update, layer normalisation and adaLN's modulation (Peebles and Xie, 2212.09748, figure 3) read each
row once and write it once. The contract, and the operators in plain PyTorch; `triton_modulated_norm` runs on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.norm_constants import EPS
from mdkern.kernels.device import has_triton

MOST_COLUMNS = 1 << 13  # of a row in the kernel, which keeps whole rows in registers; beyond, plain PyTorch does it


def plain_modulated_norm(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None
) -> Tensor:
    """`modulated_norm` in plain PyTorch."""
    if update is not None:
        assert gate is not None
        x.copy_(x.to(wide(x)) + per_row(gate, x) * update)
    return normalise(x, weight, shift, scale)


def plain_gathered_norm(
    table: Tensor, row_index: Tensor, weight: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`gathered_norm` in plain PyTorch."""
    outside = (row_index < 0) | (row_index >= table.shape[0])
    x = table[row_index.masked_fill(outside, 0)].masked_fill(outside[:, None], torch.nan)
    return x, normalise(x, weight, shift, scale)


def normalise(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x.to(wide(x)), x.shape[-1:], weight.to(wide(x)), eps=EPS)
    return (normed * (1 + per_row(scale, x)) + per_row(shift, x)).to(x.dtype)


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_row(modulation: Tensor, x: Tensor) -> Tensor:
    """``[D]`` as it is; ``[S, D]`` of sequences -> ``[N, D]`` of their rows; in the precision of sums."""
    if modulation.ndim == 2:
        modulation = modulation.repeat_interleave(x.shape[0] // modulation.shape[0], 0)
    return modulation.to(wide(x))


@torch.library.custom_op("mdkern::modulated_norm", mutates_args=("x",))
def _modulated_norm(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None
) -> Tensor:
    return plain_modulated_norm(x, weight, shift, scale, update, gate)


@_modulated_norm.register_kernel("cuda")
def _modulated_on_gpu(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None
) -> Tensor:
    if not runs_fused(x):
        return plain_modulated_norm(x, weight, shift, scale, update, gate)
    from mdkern.kernels.backbone import triton_modulated_norm  # imports Triton, no business of a machine without a GPU

    return triton_modulated_norm.modulated_norm(x, weight, shift, scale, update, gate)


@_modulated_norm.register_fake
def _modulated_fake(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mdkern::gathered_norm", mutates_args=())
def _gathered_norm(
    table: Tensor, row_index: Tensor, weight: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return plain_gathered_norm(table, row_index, weight, shift, scale)


@_gathered_norm.register_kernel("cuda")
def _gathered_on_gpu(
    table: Tensor, row_index: Tensor, weight: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    if not runs_fused(table):
        return plain_gathered_norm(table, row_index, weight, shift, scale)
    from mdkern.kernels.backbone import triton_modulated_norm

    return triton_modulated_norm.gathered_norm(table, row_index, weight, shift, scale)


@_gathered_norm.register_fake
def _gathered_fake(
    table: Tensor, row_index: Tensor, weight: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    x = table.new_empty(row_index.shape[0], table.shape[1])
    return x, torch.empty_like(x)


def runs_fused(x: Tensor) -> bool:
    return has_triton(x.device) and x.shape[1] <= MOST_COLUMNS and x.dtype != torch.float64


def modulated_norm(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [D]
    shift: Tensor,  # [D] or [S, D]
    scale: Tensor,  # [D] or [S, D]
    *,
    update: Tensor | None = None,  # [N, D]
    gate: Tensor | None = None,  # [D] or [S, D]
) -> Tensor:
    """``x += gate * update`` in place, then ``layer_norm(x) * weight * (1 + scale) + shift``.

    The modulation is shared by all rows (``[D]``), or belongs to sequences (``[S, D]``): row n of N takes row
    ``n // (N / S)`` of it. Everything is computed in float32; the norm is of the updated `x` as it is stored.

    Args:
        x: floating ``[N, D]``, contiguous: the residual stream. Written only with an `update`.
        weight: floating ``[D]``, the norm's.
        shift, scale, gate: floating, adaLN's; all of one shape. S divides N.
        update: as `x`, any row stride: the output of the sublayer before. Goes with `gate`.

    Returns:
        ``[N, D]`` of the dtype of `x`: the input of the next sublayer.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_modulation(x, x.shape[0], weight, {"shift": shift, "scale": scale, "gate": gate})
    if not x.is_contiguous():
        raise ValueError(f"x is written in place and must be contiguous, not of strides {x.stride()}")
    if (update is None) != (gate is None):
        raise ValueError("update and gate go together")
    if update is not None and (update.shape != x.shape or update.dtype != x.dtype):
        raise ValueError(f"update must be {x.dtype} {list(x.shape)}, not {update.dtype} {list(update.shape)}")
    return _modulated_norm(x, weight, shift, scale, update, gate)


def gathered_norm(
    table: Tensor,  # [T, D]
    row_index: Tensor,  # [N]
    weight: Tensor,  # [D]
    shift: Tensor,  # [D] or [S, D]
    scale: Tensor,  # [D] or [S, D]
) -> tuple[Tensor, Tensor]:
    """``x = table[row_index]`` and ``layer_norm(x) * weight * (1 + scale) + shift``: an embedding, or some rows only.

    Args:
        table: floating ``[T, D]``, any row stride.
        row_index: int32 or int64 ``[N]``. A row that `table` does not have gives NaN.
        weight, shift, scale: as for `modulated_norm`, of the N rows.

    Returns:
        x and its norm, ``[N, D]`` of the dtype of `table`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if row_index.ndim != 1 or row_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"row_index must be int64 [N], not {row_index.dtype} {list(row_index.shape)}")
    check_modulation(table, row_index.shape[0], weight, {"shift": shift, "scale": scale})
    return _gathered_norm(table, row_index, weight, shift, scale)


def check_modulation(x: Tensor, rows: int, weight: Tensor, modulation: dict[str, Tensor | None]) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"rows must be floating [N, D], not {x.dtype} {list(x.shape)}")
    width, shape = x.shape[1], tuple(modulation["shift"].shape)  # type: ignore[union-attr]
    if weight.shape != (width,):
        raise ValueError(f"weight must be [{width}], not {list(weight.shape)}")
    for name, tensor in modulation.items():
        if tensor is not None and (tensor.ndim not in (1, 2) or tensor.shape[-1] != width or tensor.shape != shape):
            raise ValueError(f"{name} must be [{width}] or [S, {width}] as the others, not {list(tensor.shape)}")
    if len(shape) == 2 and (shape[0] == 0 or rows % shape[0]):
        raise ValueError(f"{rows} rows cannot be shared out among {shape[0]} sequences")
