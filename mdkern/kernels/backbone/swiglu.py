"""`swiglu`: the activation of a Llama's MLP, ``silu(gate) * up``, or of a Gemma's, with GELU, in one pass.

Both are of Shazeer (2002.05202). `scaled_swiglu` gives it in e4m3 (`mdkern.kernels.backbone.quantise`). This file has
the contracts and the references in plain PyTorch; `triton_swiglu` has the GPU kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.quantise import quantise_rows_reference
from mdkern.kernels.backbone.scaled_linear import Scaled, new_scaled
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator

ACTIVATIONS = ("gelu", "silu")  # GELU by its tanh approximation


def swiglu_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`swiglu` in plain PyTorch."""
    return (activated(gate.to(wide(gate)), activation) * up).to(gate.dtype)


def activated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def scaled_swiglu_reference(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`scaled_swiglu` in plain PyTorch."""
    return quantise_rows_reference(F.silu(gate.to(wide(gate))) * up)


def swiglu_output(gate: Tensor, *_: object) -> Tensor:
    return gate.new_empty(*gate.shape)


swiglu_operator = operator(
    swiglu_reference, swiglu_output, "mdkern.kernels.backbone.triton_swiglu:swiglu", name="swiglu"
)

scaled_swiglu_operator = operator(
    scaled_swiglu_reference, new_scaled, "mdkern.kernels.backbone.triton_swiglu:scaled_swiglu", name="scaled_swiglu"
)


def swiglu(
    gate: Tensor,  # [N, F]
    up: Tensor,  # [N, F]
    activation: str = "silu",
) -> Tensor:
    """``act(gate) * up``, computed in float32 and rounded once.

    Args:
        gate, up: floating ``[N, F]`` of one dtype, each row contiguous, any row stride.
        activation: one of `ACTIVATIONS`: "silu", ``gate * sigmoid(gate)``, or "gelu", which is its tanh approximation.

    Returns:
        ``[N, F]``, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_halves(gate, up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    product: Tensor = swiglu_operator(gate, up, activation)
    return product


def scaled_swiglu(gate: Tensor, up: Tensor) -> Scaled:
    """`swiglu` whose result is rounded once, to e4m3 as by `quantise_rows`."""
    check_halves(gate, up)
    return Scaled(*scaled_swiglu_operator(gate, up))


def check_halves(gate: Tensor, up: Tensor) -> None:
    if gate.ndim != 2 or not gate.is_floating_point() or torch.Size([gate.stride(1), up.stride(-1)]) != (1, 1):
        raise ValueError(f"gate and up must be floating [N, F], each row together, not {gate.dtype} {list(gate.shape)}")
    check_tensor("gate", gate, gate.shape, gate.dtype, gate.device)
    check_tensor("up", up, gate.shape, gate.dtype, gate.device)
