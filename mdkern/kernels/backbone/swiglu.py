"""`swiglu`: the activation of a Llama's MLP, ``silu(gate) * up`` (Shazeer, 2002.05202), in one pass.

This file has the contract and the reference in plain PyTorch; `triton_swiglu` has the GPU kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch."""
    return (F.silu(gate.to(wide(gate))) * up).to(gate.dtype)


def swiglu_output(gate: Tensor, *_: object) -> Tensor:
    return gate.new_empty(*gate.shape)


swiglu_operator = operator(
    swiglu_reference, swiglu_output, "mdkern.kernels.backbone.triton_swiglu:swiglu", name="swiglu"
)


def swiglu(
    gate: Tensor,  # [N, F]
    up: Tensor,  # [N, F]
) -> Tensor:
    """``gate * sigmoid(gate) * up``, computed in float32 and rounded once.

    Args:
        gate, up: floating ``[N, F]`` of one dtype, each row contiguous, any row stride.

    Returns:
        ``[N, F]``, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if gate.ndim != 2 or not gate.is_floating_point() or torch.Size([gate.stride(1), up.stride(-1)]) != (1, 1):
        raise ValueError(f"gate and up must be floating [N, F], each row together, not {gate.dtype} {list(gate.shape)}")
    check_tensor("gate", gate, gate.shape, gate.dtype, gate.device)
    check_tensor("up", up, gate.shape, gate.dtype, gate.device)
    product: Tensor = swiglu_operator(gate, up)
    return product
