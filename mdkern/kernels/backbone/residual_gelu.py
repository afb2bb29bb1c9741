"""`residual_gelu`: from attention's result to an MLP's hidden units in one launch, for narrow streams.

Attention's projection, the gated update of the stream, the norm and the MLP's first product with its GELU. Where rows
are short, a program can have whole ones, and repeats the projection for its share of the hidden units sooner than a
launch of its own would take. The norm is folded into the product (`folded_norm`). This file has the contract and the
reference in plain PyTorch; `triton_residual_gelu` is the GPU kernel. Measurements: docs/notes/backbone.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.backbone.folded_norm import row_sums
from mdkern.kernels.backbone.linear import MIDDLE_ROWS, linear_gelu_reference, reads_in_bulk
from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.invariant import is_batch_invariant
from mdkern.kernels.operator import operator

PART = 64  # the width must be a multiple
MOST_COLUMNS = 256
UNITS = 128  # the number of hidden units must be a multiple


def residual_gelu_reference(
    stream: Tensor, x: Tensor, weight: Tensor, gate: Tensor, up: Tensor, up_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`residual_gelu` in plain PyTorch."""
    full = stream.to(wide(stream)) + gate * torch.nn.functional.linear(x, weight)
    updated = full.to(stream.dtype)
    return updated, linear_gelu_reference(updated, up, up_bias, row_sums(full, PART))


residual_gelu_operator = operator(
    residual_gelu_reference,
    lambda stream, x, weight, gate, up, up_bias: (torch.empty_like(stream), stream.new_empty(len(stream), len(up))),
    "mdkern.kernels.backbone.triton_residual_gelu:residual_gelu",
    name="residual_gelu",
)


def runs_at_once(stream: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> bool:
    """Whether the kernel is the fast way: rows enough, narrow ones, one gate, on the card that it was measured on."""
    width = stream.shape[1]
    return (
        stream.shape[0] >= MIDDLE_ROWS
        and width % PART == 0
        and width <= MOST_COLUMNS
        and up.shape[0] % UNITS == 0
        and gate.ndim == 1
        and not is_batch_invariant()
        and weight.is_contiguous()
        and reads_in_bulk(stream, weight)
    )


def residual_gelu(
    stream: Tensor,  # [N, D]
    x: Tensor,  # [N, D]
    weight: Tensor,  # [D, D]
    gate: Tensor,  # [D]
    up: Tensor,  # [F, D]
    up_bias: Tensor,  # [F]
) -> tuple[Tensor, Tensor]:
    """``stream + gate * (x @ weight.T)``, and ``gelu(rstd * (that @ up.T) + up_bias)`` with its rows' ``rstd``.

    Args:
        stream: floating ``[N, D]``, contiguous, with D a multiple of 64 up to 256. It is left as it is.
        x: attention's result, contiguous; all are of one dtype.
        weight, gate: of attention's projection.
        up, up_bias: as `folded_norm.fold_norm` makes them, with F a multiple of 128.

    Returns:
        The new stream ``[N, D]`` and the hidden units ``[N, F]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_tensor("stream", stream, stream.shape, stream.dtype, stream.device)
    if stream.ndim != 2 or not stream.is_floating_point() or stream.shape[1] % PART or stream.shape[1] > MOST_COLUMNS:
        raise ValueError(
            f"stream must be floating [N, D] with D a multiple of {PART} up to {MOST_COLUMNS},"
            f" not {stream.dtype} {list(stream.shape)}"
        )
    width, units = stream.shape[1], up.shape[0]
    if units % UNITS:
        raise ValueError(f"there must be a multiple of {UNITS} hidden units, not {units}")
    shapes = {"stream": (stream, stream.shape), "x": (x, stream.shape), "weight": (weight, (width, width))}
    shapes |= {"gate": (gate, (width,)), "up": (up, (units, width)), "up_bias": (up_bias, (units,))}
    for name, (tensor, shape) in shapes.items():
        check_tensor(name, tensor, shape, stream.dtype, stream.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
    updated, hidden = residual_gelu_operator(stream, x, weight, gate, up, up_bias)
    return updated, hidden
