"""Checks of the tensors that operators are given. Their values are not read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise a ValueError that says what was expected, if a tensor is not of this kind. None is accepted.

    Args:
        dtypes: the dtypes that are accepted; the message recommends the first.
        device: the device of all tensors of the call. Meta tensors, which hold no values, are refused.
    """
    if tensor is None:
        return
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if tensor.is_meta:
        raise ValueError(f"{name} is a meta tensor, which holds no values: move the model and its inputs to a device")
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes or tensor.layout != torch.strided:
        kind = tensor.dtype if tensor.layout == torch.strided else f"{tensor.layout} {tensor.dtype}"
        raise ValueError(f"{name} must be {dtypes[0]} {list(shape)}, not {kind} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the other tensors, not on {tensor.device}")


def check_rows_apart(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is written in place row by row and whose rows overlap, such as an expanded view."""
    if tensor.shape[0] > 1 and tensor.stride(0) < tensor[0].numel():
        raise ValueError(f"{name} is written in place and its rows overlap, of strides {tensor.stride()}: give a clone")


def check_written(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is written in place and is not contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} is written in place and must be contiguous, not of strides {tensor.stride()}: "
            "give a clone and copy it back"
        )
