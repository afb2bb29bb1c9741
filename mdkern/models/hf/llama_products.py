"""The matrix products of a block of a model built like Llama, and what lies between one and the next.

The model's own weights are used where they are: by `mdkern.kernels.backbone.joint`, which runs several products at
once, by `skinny_parts` for few rows, and else by PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.joint import (
    joint_linear,
    joint_parts,
    joint_swiglu,
    runs_joint_linear,
    runs_joint_parts,
    runs_joint_swiglu,
)
from mdkern.kernels.backbone.rms_norm import gathered_rms_norm, rms_norm
from mdkern.kernels.backbone.skinny import runs_skinny, skinny_parts
from mdkern.kernels.backbone.swiglu import swiglu
from mdkern.models.hf.llama_experts import run_experts
from mdkern.models.hf.llama_parts import Block, Linear, Norm


class Products:
    """A block's products of rows ``[N, D]``. What its norms give is for its own products only."""

    def __init__(self, block: Block, head_dim: int) -> None:
        self.block, self.head_dim = block, head_dim

    def gathered_norm(self, table: Tensor, index: Tensor, norm: Norm) -> tuple[Tensor, Any]:
        """Some rows of a table, and their norm."""
        return gathered_rms_norm(table, index, *norm)

    def norm(self, x: Tensor, norm: Norm, update: Tensor | None = None) -> Any:
        """``x += update``, and the norm of it."""
        return rms_norm(x, *norm, update=update)

    def heads(self, normed: Any, *, queries: bool = False, keys: bool = False) -> list[Tensor]:
        """Queries, or keys and values, or all three, ``[N, heads, head_dim]`` each."""
        block = self.block
        layers = (*([block.query] if queries else ()), *([block.key, block.value] if keys else ()))
        return [product.unflatten(1, (-1, self.head_dim)) for product in self.products(normed, layers)]

    def products(self, normed: Tensor, layers: Sequence[Linear]) -> Sequence[Tensor]:
        if runs_joint_linear(normed, *(layer.weight for layer in layers)):
            return joint_linear(normed, *layers)
        return [F.linear(normed, *layer) for layer in layers]

    def takes_rounded(self, normed: Any) -> bool:
        """Whether `attention_update` of as many rows is given rows in e4m3 with a scale for each head."""
        return False

    def attention_update(self, attended: Any) -> Tensor:
        """The attention's update of the residual stream, as `rms_norm` takes it."""
        return self.update(attended, self.block.attn_out)

    def mlp_update(self, normed: Any) -> Tensor:
        """The output of the MLP, of the mixture of experts in its place, or of both."""
        block = self.block
        mixed = None if block.experts is None else run_experts(normed, block.experts)
        if block.gate is None or block.up is None or block.down is None:
            assert mixed is not None
            return mixed
        activated = self.activated(normed, block.gate, block.up)
        return self.update(activated, block.down) if mixed is None else mixed.add_(F.linear(activated, *block.down))

    def activated(self, normed: Tensor, gate: Linear, up: Linear) -> Tensor:
        """The input of the last product of the MLP."""
        if runs_joint_swiglu(normed, gate.weight, up.weight):
            return joint_swiglu(normed, gate, up)
        return swiglu(F.linear(normed, *gate), F.linear(normed, *up))

    def update(self, x: Tensor, layer: Linear) -> Tensor:
        if runs_joint_parts(x, layer.weight):
            return joint_parts(x, *layer)
        return skinny_parts(x, *layer) if runs_skinny(x, layer.weight) else F.linear(x, *layer)
