"""Shallow copies of DiffusionGemma's modules that compute the same in fewer passes over memory.

A copy shares weights and hooks with its original, which is not changed. In it, norms are one kernel each, and a mixture
of experts is `gated_experts`, which needs no synchronisation with the host, so that a pass can be captured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.kernels.backbone.experts import gated_experts


def norm(self: Any, hidden_states: Tensor) -> Tensor:
    """DiffusionGemmaRMSNorm: in float32, rounded once."""
    weight = self.weight if self.with_scale else None
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, self.eps)


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DiffusionGemmaTextExperts, if its gate is the tanh approximation of GELU, as in every config so far."""
    if type(self.act_fn).__name__ not in TANH_GELU:
        own: Tensor = type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        return own
    return gated_experts(hidden_states, top_k_index, top_k_weights.float(), self.gate_up_proj, self.down_proj)


TANH_GELU = "GELUTanh", "PytorchGELUTanh"  # transformers' names, today's and an older one
REPLACED: dict[str, Callable[..., Tensor]] = {"DiffusionGemmaRMSNorm": norm, "DiffusionGemmaTextExperts": experts}


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
