"""`gated_experts`, `listed_experts`: a mixture of experts of gated MLPs.

That is ``sum_k w_k down_k(act(gate_k(x)) * up_k(x))`` for each row (Shazeer et al., 1701.06538; gates of 2002.05202).
Experts without a row are not read. `gated_experts` takes the experts' weights stacked in one tensor, `listed_experts`
takes a tensor of each expert where it lies, so that no stacked copy is needed. This file has the contracts and the
references in plain PyTorch; `triton_experts` has the GPU kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.swiglu import ACTIVATIONS, activated
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator

ALIGNED = 16  # bytes of which addresses of listed weights are multiples


def gated_experts_reference(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """`gated_experts` in plain PyTorch."""
    gates, ups = gate_up.chunk(2, dim=1)
    return mixture(x, index, weights, gates.unbind(), ups.unbind(), down.unbind(), activation)


def listed_experts_reference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gates: list[Tensor],
    ups: list[Tensor],
    downs: list[Tensor],
    places: Tensor,
    activation: str,
) -> Tensor:
    """`listed_experts` in plain PyTorch."""
    return mixture(x, index, weights, gates, ups, downs, activation)


def mixture(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gates: Sequence[Tensor],
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    activation: str,
) -> Tensor:
    kind = wide(x)
    out = torch.zeros(x.shape, dtype=kind, device=x.device)
    for expert in index.unique().tolist():
        row, choice = (index == expert).nonzero(as_tuple=True)
        gate, up = (F.linear(x[row].to(kind), weight[expert].to(kind)) for weight in (gates, ups))
        gated = (activated(gate, activation) * up).to(x.dtype)
        output = F.linear(gated.to(kind), downs[expert].to(kind)).to(x.dtype)
        out.index_add_(0, row, output.to(kind) * weights[row, choice, None])
    return out.to(x.dtype)


KERNELS = "mdkern.kernels.backbone.triton_experts"
gated_experts_operator = operator(
    gated_experts_reference, lambda x, *_: x.new_empty(*x.shape), f"{KERNELS}:gated_experts", name="gated_experts"
)
listed_experts_operator = operator(
    listed_experts_reference, lambda x, *_: x.new_empty(*x.shape), f"{KERNELS}:listed_experts", name="listed_experts"
)


def gated_experts(
    x: Tensor,  # [N, D]
    index: Tensor,  # [N, K]
    weights: Tensor,  # [N, K]
    gate_up: Tensor,  # [E, 2 F, D]
    down: Tensor,  # [E, D, F]
    activation: str = "gelu",
) -> Tensor:
    """``sum_k weights[n, k] * down[e] @ (act(gate[e] @ x[n]) * (up[e] @ x[n]))`` with ``e = index[n, k]``.

    Sums are in float32; ``act(gate) * up`` and the output of each expert are rounded to the dtype of `x`. Nothing is
    read on the host, so that it can be captured in a CUDA graph.

    Args:
        x: floating ``[N, D]``.
        index: int64 ``[N, K]`` in 0..E-1. On a GPU its values are not checked.
        weights: float32 ``[N, K]``.
        gate_up: ``[E, 2 F, D]`` of the dtype of `x`, contiguous; the rows of the gate first.
        down: ``[E, D, F]`` of the dtype of `x`, contiguous.
        activation: "gelu", which is its tanh approximation, or "silu".

    Returns:
        ``[N, D]`` of the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_rows(x, index, weights, activation)
    if down.ndim != 3:
        raise ValueError(f"down must be [E, D, F], not {list(down.shape)}")
    experts, _, width = down.shape
    check_tensor("down", down, (experts, x.shape[1], width), x.dtype, x.device)
    check_tensor("gate_up", gate_up, (experts, 2 * width, x.shape[1]), x.dtype, x.device)
    if not (down.is_contiguous() and gate_up.is_contiguous()):
        raise ValueError("gate_up and down must be contiguous")
    out: Tensor = gated_experts_operator(x, index, weights, gate_up, down, activation)
    return out


def listed_experts(
    x: Tensor,  # [N, D]
    index: Tensor,  # [N, K]
    weights: Tensor,  # [N, K]
    gates: Sequence[Tensor],  # of each expert [F, D]
    ups: Sequence[Tensor],  # of each expert [F, D]
    downs: Sequence[Tensor],  # of each expert [D, F]
    places: Tensor,  # [3, E]
    activation: str = "silu",
) -> Tensor:
    """`gated_experts` of weights that are tensors of their own.

    Args:
        gates, ups, downs: as many of each, of the dtype of `x`, contiguous, at multiples of 16 bytes.
        places: `places_of` these weights.

    Returns:
        ``[N, D]`` of the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_rows(x, index, weights, activation)
    if not len(gates) == len(ups) == len(downs) > 0:
        raise ValueError(f"as many gates, ups and downs are needed, not {len(gates)}, {len(ups)} and {len(downs)}")
    width = len(gates[0])
    for name, shape, tensors in (("gates", (width, x.shape[1]), (*gates, *ups)), ("downs", (x.shape[1], width), downs)):
        if any(tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device for tensor in tensors):
            raise ValueError(f"{name} must be {x.dtype} {list(shape)} on {x.device}")
    check_tensor("places", places, (3, len(gates)), torch.int64, x.device)
    out: Tensor = listed_experts_operator(x, index, weights, [*gates], [*ups], [*downs], places, activation)
    return out


def places_of(gates: Sequence[Tensor], ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Tensor:
    """Where weights lie: int64 ``[3, E]`` on their device, gates and ups from the first gate, downs from the first.

    They are counted in numbers of the weights' dtype.

    Raises:
        ValueError: a weight is not contiguous or not aligned.
    """
    rows = []
    for tensors, first in ((gates, gates[0]), (ups, gates[0]), (downs, downs[0])):
        if any(not tensor.is_contiguous() or tensor.data_ptr() % ALIGNED for tensor in tensors):
            raise ValueError("weights of experts must be contiguous, at addresses that are multiples of 16 bytes")
        rows.append([(tensor.data_ptr() - first.data_ptr()) // first.element_size() for tensor in tensors])
    return torch.tensor(rows, dtype=torch.int64).to(gates[0].device)


def check_rows(x: Tensor, index: Tensor, weights: Tensor, activation: str) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating [N, D], not {x.dtype} {list(x.shape)}")
    if index.ndim != 2 or len(index) != len(x):
        raise ValueError(f"index must be [{len(x)}, K], not {list(index.shape)}")
    check_tensor("index", index, index.shape, torch.int64, x.device)
    check_tensor("weights", weights, index.shape, torch.float32, x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
