"""Shallow copies of DiffusionGemma's modules that compute the same in fewer passes over memory.

A copy shares weights and hooks with its original, which is not changed. In it, norms are one kernel each, or one with
the additions around them; queries and keys are normed and rotated in one; and a mixture of experts is `gated_experts`,
which needs no synchronisation with the host, so that a pass can be captured. What has hooks or a forward of its own is
run as it is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.kernels.backbone.experts import gated_experts
from mdkern.kernels.backbone.place_heads import place_heads
from mdkern.kernels.backbone.sandwich import choose_experts, sandwich_norm
from mdkern.kernels.backbone.swiglu import swiglu

TANH_GELU = "GELUTanh", "PytorchGELUTanh"  # transformers' names, today's and an older one
MOST_REPEATED = 96 << 20  # bytes of keys and values that attention repeats for the heads that share them
MOST_SHARED = 256  # numbers of a head up to which it need not
NORMS = (
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
    "post_feedforward_layernorm",
)


class Angles(tuple[Tensor, Tensor]):
    """The model's ``(cos, sin)``, with the distinct halves of both in float32, ``[P, head_dim / 2]``."""

    halves: tuple[Tensor, Tensor]


def norm(self: Any, hidden_states: Tensor) -> Tensor:
    """DiffusionGemmaRMSNorm: in float32, rounded once. The layer before may have computed it."""
    by, normed = vars(hidden_states).pop("normed", (None, None))  # used once, so that it does not stay in memory
    if by is self and normed is not None:
        return normed
    weight = self.weight if self.with_scale else None
    return F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, self.eps)


def rotary(self: Any, *args: Any, **kwargs: Any) -> Angles:
    """DiffusionGemmaTextRotaryEmbedding."""
    angles = Angles(type(self).forward(self, *args, **kwargs))
    half = angles[0].shape[-1] // 2
    cos, sin = (part[..., :half].reshape(-1, half).float().contiguous() for part in angles)
    angles.halves = cos, sin
    return angles


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DiffusionGemmaTextExperts, if its gate is the tanh approximation of GELU, as in every config so far."""
    if type(self.act_fn).__name__ not in TANH_GELU:
        own: Tensor = type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        return own
    return gated_experts(hidden_states, top_k_index, top_k_weights.float(), self.gate_up_proj, self.down_proj)


def mlp(self: Any, x: Tensor) -> Tensor:
    """DiffusionGemmaText4MLP, if its gate is the tanh approximation of GELU."""
    if type(self.act_fn).__name__ not in TANH_GELU:
        own: Tensor = type(self).forward(self, x)
        return own
    gate, up = self.gate_proj(x), self.up_proj(x)
    gated = swiglu(gate.flatten(0, -2), up.flatten(0, -2), "gelu")
    down: Tensor = self.down_proj(gated.view(gate.shape))
    return down


def attention(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, past_key_values: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention of the encoder or the decoder."""
    if not (isinstance(position_embeddings, Angles) and is_lean(norm, self.q_norm, self.k_norm, self.v_norm)):
        own: tuple[Tensor, Any] = type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return own
    shape, by_head = hidden_states.shape[:-1], (-1, self.head_dim)
    query, key = (project(hidden_states).view(*shape, *by_head) for project in (self.q_proj, self.k_proj))
    value = key if self.v_proj is None else self.v_proj(hidden_states).view(key.shape)
    value = self.v_norm(value)  # a new tensor, so that keys may be changed in place
    cos, sin = position_embeddings.halves
    norms = {"query_norm": self.q_norm.weight, "key_norm": self.k_norm.weight, "eps": self.q_norm.eps}
    rows = query.flatten(0, 1), key.flatten(0, 1)
    canvas = hasattr(self, "append_to_cache")  # it is the decoder's
    room_for = getattr(past_key_values.layers[self.layer_idx], "with_canvas", None)
    if canvas and room_for is not None:
        kept, (seen, values_seen) = room_for(len(cos))
        place_heads(cos, sin, *rows, value.flatten(0, 1), length=len(cos), kept=kept, **norms)
        query, key, value = query.transpose(1, 2), seen, values_seen
    else:
        place_heads(cos, sin, *rows, length=len(cos), **norms)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if canvas:
            key, value = self.append_to_cache(past_key_values, key, value)
        else:
            key, value = past_key_values.update(key, value, self.layer_idx)
    module: Any = sys.modules[type(self).__module__]
    attend = module.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, module.eager_attention_forward
    )
    settings = {"scaling": self.scaling, "sliding_window": self.sliding_window, "is_causal": self.is_causal}
    attend = partial(attend, self, dropout=0.0, **settings, **kwargs)
    size = texts_at_a_time(self.config._attn_implementation, query, key, attention_mask)
    if size < shape[0]:
        attend_in_parts(attend, query, key, value, attention_mask, size)
        output, weights = query.transpose(1, 2), None
    else:
        output, weights = attend(query, key, value, attention_mask)
    return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


def texts_at_a_time(implementation: str, query: Tensor, key: Tensor, mask: Tensor | None) -> int:
    """How many texts' attention is run together: fewer than all where their keys would be repeated for many heads.

    PyTorch has no fast attention with a mask, or with more than 256 numbers a head, that shares keys between heads.
    """
    batch, heads, _, depth = query.shape
    if implementation != "sdpa" or heads == key.shape[1] or (mask is None and depth <= MOST_SHARED):
        return batch
    return max(1, MOST_REPEATED // (2 * heads * key.shape[2] * depth * key.element_size()))


def attend_in_parts(
    attend: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, size: int
) -> None:
    """Attention of `size` texts at a time. What it gives takes the place of the queries."""
    for first in range(0, len(query), size):
        part = slice(first, first + size)
        seen = mask if mask is None or len(mask) == 1 else mask[part]
        query[part] = attend(query[part], key[part], value[part], seen)[0].transpose(1, 2)


def layer(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """A layer of the encoder or the decoder: attention, then an MLP beside a mixture of experts."""
    router = self.router
    fits = is_lean(norm, router.norm, *(getattr(self, name) for name in NORMS)) and is_lean(None, router)
    if not fits:
        own: Tensor = type(self).forward(self, hidden_states, **kwargs)
        return own
    after_attention, before_mlp, before_experts, after_mlp, after_experts, outer = (
        getattr(self, name).weight for name in NORMS
    )
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    eps, stream = router.eps, hidden_states.reshape(-1, hidden_states.shape[-1])
    norms = [before_experts, router.scale, before_mlp]
    stream, normed = sandwich_norm(
        stream.contiguous(), attended.reshape(stream.shape), after_attention, after=norms, eps=eps
    )
    del attended  # this and what is popped is in memory for no longer than it is needed
    mixed = self.mlp(normed.pop())
    weights, index = choose_experts(
        router.proj(normed.pop()), router.per_expert_scale, router.config.top_k_experts, router.scalar_root_size
    )
    following: tuple[Any, Any] = getattr(self, "following", (None, None))
    next_norm, next_layer = following
    joined = next_norm is not None and may_follow(self, next_norm, next_layer)
    stream, normed = sandwich_norm(
        stream,
        mixed,
        after_mlp,
        second=self.experts(normed.pop(), index, weights),
        second_weight=after_experts,
        outer_weight=outer,
        factor=self.layer_scalar,
        after=[next_norm.weight] if joined else [],
        eps=eps,
    )
    out: Any = stream.view(hidden_states.shape)
    if joined:
        out.normed = next_norm, normed[0].view(out.shape)
    return out


def may_follow(own: nn.Module, first_norm: nn.Module, next_layer: nn.Module | None) -> bool:
    """Whether nothing comes between a layer and the norm after it."""
    layers = (own,) if next_layer is None else (own, next_layer)
    return is_lean(norm, first_norm) and is_lean(layer, *layers)


REPLACED: dict[str, Callable[..., Any]] = {
    "DiffusionGemmaRMSNorm": norm,
    "DiffusionGemmaTextRotaryEmbedding": rotary,
    "DiffusionGemmaTextExperts": experts,
    "DiffusionGemmaText4MLP": mlp,
    "DiffusionGemmaEncoderTextAttention": attention,
    "DiffusionGemmaDecoderTextAttention": attention,
    "DiffusionGemmaEncoderTextLayer": layer,
    "DiffusionGemmaDecoderTextLayer": layer,
}


def is_lean(forward: Callable[..., Any] | None, *modules: nn.Module) -> bool:
    """Whether all modules have this forward (None: that of their class) and no hooks: so they need not be called."""
    return all(
        getattr(vars(module).get("forward"), "__func__", vars(module).get("forward")) is forward
        and not (module._forward_hooks or module._forward_pre_hooks)
        for module in modules
    )


def lean_copy(module: nn.Module) -> nn.Module:
    """A shallow copy of a module and everything below it, with the forwards of `REPLACED`.

    A module with a forward of its own (of an adapter or a wrapper) keeps it.
    """
    copied = copy.copy(module)
    copied._modules = {name: None if child is None else lean_copy(child) for name, child in module._modules.items()}
    forward = REPLACED.get(type(module).__name__)
    if forward is not None and "forward" not in vars(module):
        copied.forward = MethodType(forward, copied)
    if isinstance(layers := copied._modules.get("layers"), nn.ModuleList) and hasattr(copied, "norm"):
        connect(list(layers), copied.norm)
    return copied


def connect(layers: list[Any], last: Any) -> None:
    """Tell each layer which norm its output goes to, and of which layer that is (None: of none)."""
    for own, after in zip(layers, [*layers[1:], None]):
        vars(own)["following"] = last if after is None else getattr(after, "input_layernorm", None), after
