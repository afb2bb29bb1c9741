"""`modulated_norm`, `gathered_norm`: all that lies between two matrix products of an adaLN transformer, in one pass.

The gated residual update, the layer normalisation and adaLN's modulation (Peebles and Xie, 2212.09748, figure 3) are
done in one kernel that reads and writes each row once. This file has the contracts and the references in plain PyTorch;
`triton_modulated_norm` has the GPU kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.norm_constants import EPS
from mdkern.kernels.checks import check_tensor, check_written
from mdkern.kernels.device import has_triton
from mdkern.kernels.operator import operator

MOST_COLUMNS = 1 << 13  # the kernel keeps whole rows in registers; wider ones go to the reference


def modulated_norm_reference(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, update: Tensor | None, gate: Tensor | None
) -> Tensor:
    """`modulated_norm` in plain PyTorch."""
    if update is not None:
        assert gate is not None
        x.copy_(x.to(wide(x)) + per_row(gate, x) * update)
    return normalise(x, weight, shift, scale)


def gathered_norm_reference(
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
    """Modulation of each row in float32 or float64: ``[D]`` is unchanged, ``[S, D]`` (sequences) becomes ``[N, D]``."""
    if modulation.ndim == 2:
        modulation = modulation.repeat_interleave(x.shape[0] // modulation.shape[0], 0)
    return modulation.to(wide(x))


def gathered_norm_outputs(table: Tensor, row_index: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    x = table.new_empty(row_index.shape[0], table.shape[1])
    return x, torch.empty_like(x)


KERNELS = "mdkern.kernels.backbone.triton_modulated_norm"
modulated_norm_operator = operator(
    modulated_norm_reference,
    lambda x, *_: torch.empty_like(x),
    f"{KERNELS}:modulated_norm",
    mutates=("x",),
    name="modulated_norm",
)
gathered_norm_operator = operator(
    gathered_norm_reference, gathered_norm_outputs, f"{KERNELS}:gathered_norm", name="gathered_norm"
)


def fits(x: Tensor) -> bool:
    """Whether the kernel can run such rows."""
    return x.shape[1] <= MOST_COLUMNS and x.dtype != torch.float64


def runs_fused(x: Tensor) -> bool:
    """Whether the kernel runs such rows on the device that they are on."""
    return has_triton(x.device) and fits(x)


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

    The modulation is shared by all rows (``[D]``) or given for each of S sequences (``[S, D]``), of which row n of N
    takes row ``n // (N / S)``. Everything is computed in float32; the norm is of the updated `x` as it is stored.

    Args:
        x: floating ``[N, D]``, contiguous: the residual stream. Written only if there is an `update`.
        weight: floating ``[D]``, the norm's.
        shift, scale, gate: floating, adaLN's modulation, all of one shape. S divides N.
        update: shape and dtype of `x`, any row stride: the output of the sublayer before. Given with `gate`, or not.

    Returns:
        ``[N, D]`` of the dtype of `x`: the input of the next sublayer.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_modulation(x, x.shape[0], weight, {"shift": shift, "scale": scale, "gate": gate})
    check_written("x", x)
    if (update is None) != (gate is None):
        raise ValueError("update and gate go together")
    if update is not None and (update.shape != x.shape or update.dtype != x.dtype):
        raise ValueError(f"update must be {x.dtype} {list(x.shape)}, not {update.dtype} {list(update.shape)}")
    normed: Tensor = modulated_norm_operator(x, weight, shift, scale, update, gate)
    return normed


def gathered_norm(
    table: Tensor,  # [T, D]
    row_index: Tensor,  # [N]
    weight: Tensor,  # [D]
    shift: Tensor,  # [D] or [S, D]
    scale: Tensor,  # [D] or [S, D]
) -> tuple[Tensor, Tensor]:
    """``x = table[row_index]``, and ``layer_norm(x) * weight * (1 + scale) + shift``.

    For an embedding and the norm after it, or for the norm of some rows only.

    Args:
        table: floating ``[T, D]``, any row stride.
        row_index: int32 or int64 ``[N]``. An index outside 0..T-1 gives a row of NaN.
        weight, shift, scale: as for `modulated_norm`, of the N rows.

    Returns:
        x and its norm, ``[N, D]`` of the dtype of `table`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_tensor("row_index", row_index, (row_index.numel(),), (torch.int64, torch.int32), table.device)
    check_modulation(table, row_index.shape[0], weight, {"shift": shift, "scale": scale})
    x, normed = gathered_norm_operator(table, row_index, weight, shift, scale)
    return x, normed


def check_modulation(x: Tensor, rows: int, weight: Tensor, modulation: dict[str, Tensor | None]) -> None:
    check_tensor("x", x, x.shape, x.dtype, x.device)
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"rows must be floating [N, D], not {x.dtype} {list(x.shape)}")
    width, shape = x.shape[1], tuple(modulation["shift"].shape)  # type: ignore[union-attr]
    check_tensor("weight", weight, (width,), weight.dtype, x.device)
    for name, tensor in modulation.items():
        if tensor is None:
            continue
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != width or tensor.shape != shape:
            raise ValueError(f"{name} must be [{width}] or [S, {width}] as the others, not {list(tensor.shape)}")
        check_tensor(name, tensor, shape, tensor.dtype, x.device)
    if len(shape) == 2 and (shape[0] == 0 or rows % shape[0]):
        raise ValueError(f"{rows} rows cannot be shared out among {shape[0]} sequences")
