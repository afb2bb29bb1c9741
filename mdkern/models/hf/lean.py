"""Shallow copies of DiffusionGemma's modules that compute the same in fewer passes over memory.

A copy shares weights and hooks with its original, which is not changed. In it, norms are one kernel each, and a mixture
of experts keeps neither float32 copies of the experts' outputs nor a second copy in the order of the tokens. Experts
are run by PyTorch's grouped products, which need no synchronisation with the host, so that a pass can be captured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.kernels.backbone.combine import combine


def norm(self: Any, hidden_states: Tensor) -> Tensor:
    """DiffusionGemmaRMSNorm: in float32, rounded once."""
    weight = self.weight if self.with_scale else None
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, self.eps)


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DiffusionGemmaTextExperts: the tokens sorted by expert, two grouped products, and the weighted sum."""
    tokens, count = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    sizes = expert.float() if expert.device.type == "cpu" else expert.int()
    ends = torch.histc(sizes, bins=self.num_experts, min=0, max=self.num_experts - 1).cumsum(0, dtype=torch.int32)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    gated = F.grouped_mm(hidden_states[order // count], self.gate_up_proj.transpose(-2, -1), offs=ends)
    gated = self._apply_gate(gated)
    outputs = F.grouped_mm(gated, self.down_proj.transpose(-2, -1), offs=ends)
    return combine(outputs, place.view(tokens, count), top_k_weights.float())


REPLACED: dict[str, Callable[..., Tensor]] = {"DiffusionGemmaRMSNorm": norm}
if hasattr(F, "grouped_mm"):
    REPLACED["DiffusionGemmaTextExperts"] = experts


def lean_copy(module: nn.Module) -> nn.Module:
    """A shallow copy of a module and everything below it, with the forwards of `REPLACED`.

    A module with a forward of its own (of an adapter or a wrapper) keeps it.
    """
    copied = copy.copy(module)
    copied._modules = {name: None if child is None else lean_copy(child) for name, child in module._modules.items()}
    forward = REPLACED.get(type(module).__name__)
    if forward is not None and "forward" not in vars(module):
        copied.forward = MethodType(forward, copied)
    return copied
