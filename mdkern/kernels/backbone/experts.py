"""`gated_experts`: a mixture of experts of gated MLPs, ``sum_k w_k down_k(gelu(gate_k(x)) * up_k(x))`` for each row.

Experts without a row are not read (Shazeer et al., 1701.06538; gates of 2002.05202). This file has the contract and the
reference in plain PyTorch; `triton_experts` has the GPU kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator


def gated_experts_reference(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`gated_experts` in plain PyTorch."""
    kind = wide(x)
    out = torch.zeros(x.shape, dtype=kind, device=x.device)
    for expert in index.unique().tolist():
        row, choice = (index == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[row].to(kind), gate_up[expert].to(kind)).chunk(2, dim=-1)
        gated = (F.gelu(gate, approximate="tanh") * up).to(x.dtype)
        output = F.linear(gated.to(kind), down[expert].to(kind)).to(x.dtype)
        out.index_add_(0, row, output.to(kind) * weights[row, choice, None])
    return out.to(x.dtype)


gated_experts_operator = operator(
    gated_experts_reference,
    lambda x, *_: x.new_empty(*x.shape),
    "mdkern.kernels.backbone.triton_experts:gated_experts",
    name="gated_experts",
)


def gated_experts(
    x: Tensor,  # [N, D]
    index: Tensor,  # [N, K]
    weights: Tensor,  # [N, K]
    gate_up: Tensor,  # [E, 2 F, D]
    down: Tensor,  # [E, D, F]
) -> Tensor:
    """``sum_k weights[n, k] * down[e] @ (gelu(gate[e] @ x[n]) * (up[e] @ x[n]))`` with ``e = index[n, k]``.

    GELU is its tanh approximation. Sums are in float32; ``gelu(gate) * up`` and the output of each expert are rounded
    to the dtype of `x`. Nothing is read on the host, so that it can be captured in a CUDA graph.

    Args:
        x: floating ``[N, D]``.
        index: int64 ``[N, K]`` in 0..E-1. On a GPU its values are not checked.
        weights: float32 ``[N, K]``.
        gate_up: ``[E, 2 F, D]`` of the dtype of `x`, contiguous; the rows of the gate first.
        down: ``[E, D, F]`` of the dtype of `x`, contiguous.

    Returns:
        ``[N, D]`` of the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating [N, D], not {x.dtype} {list(x.shape)}")
    if index.ndim != 2 or len(index) != len(x):
        raise ValueError(f"index must be [{len(x)}, K], not {list(index.shape)}")
    check_tensor("index", index, index.shape, torch.int64, x.device)
    check_tensor("weights", weights, index.shape, torch.float32, x.device)
    if down.ndim != 3:
        raise ValueError(f"down must be [E, D, F], not {list(down.shape)}")
    experts, _, width = down.shape
    check_tensor("down", down, (experts, x.shape[1], width), x.dtype, x.device)
    check_tensor("gate_up", gate_up, (experts, 2 * width, x.shape[1]), x.dtype, x.device)
    if not (down.is_contiguous() and gate_up.is_contiguous()):
        raise ValueError("gate_up and down must be contiguous")
    out: Tensor = gated_experts_operator(x, index, weights, gate_up, down)
    return out
