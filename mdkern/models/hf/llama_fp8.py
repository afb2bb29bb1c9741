"""The products of a model built like Llama in e4m3 (8 bits), with a copy of its weights that is kept beside them.

Weights have a scale for each output channel, and what they are multiplied with has one for each row, or in products of
few rows one for each part of a row. It is rounded by the kernel that computes it. Residual stream, norms, rotary
embedding and attention are as without. Measurements: docs/notes/llama.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from mdkern.kernels.backbone.fp8_skinny import (
    TILE,
    Tiled,
    fp8_skinny_linear,
    fp8_skinny_parts,
    fp8_skinny_swiglu,
    runs_fp8_skinny,
)
from mdkern.kernels.backbone.quantise import FP8, quantise_rows
from mdkern.kernels.backbone.rms_norm import gathered_scaled_rms_norm, scaled_rms_norm
from mdkern.kernels.backbone.scaled_linear import MULTIPLE, Scaled, scaled_linear
from mdkern.kernels.backbone.swiglu import scaled_swiglu
from mdkern.kernels.device import computes_in_fp8
from mdkern.models.denoiser import PREPARED
from mdkern.models.fingerprint import UNKNOWN, version_of
from mdkern.models.hf.llama_parts import Block, Linear, Norm, Parts, tensors_of
from mdkern.models.hf.llama_products import Products


class Packed(NamedTuple):
    """Layers one above the other, in e4m3."""

    values: Tensor  # e4m3 [C, K]
    scales: Tensor  # float32 [C]
    bias: Tensor | None  # [C]

    def rows(self, first: int | None, last: int | None) -> Packed:
        """Some of its output channels."""
        return Packed(*(None if part is None else part[first:last] for part in self))  # type: ignore[arg-type]

    @property
    def weight(self) -> Scaled:
        return Scaled(self.values, self.scales)


class Fp8Block(NamedTuple):
    qkv: Packed
    attn_out: Packed
    gate_up: Packed
    down: Packed


class Source(NamedTuple):
    """What the copies of `PREPARED` were made from: the weights, their versions then, and the sums of their bits."""

    weights: list[tuple[ref[Tensor], tuple[int, ...]]]
    sums: Tensor


MADE_FROM: WeakKeyDictionary[nn.Module, Source] = WeakKeyDictionary()
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def why_not(parts: Parts) -> str:
    """Why products in e4m3 cannot stand in for a model's, in words that follow "because"; "" if they can."""
    if any(block.experts is not None for block in parts.blocks):
        return "it has mixtures of experts"
    weights = [layer.weight for block in parts.blocks for layers in layers_of(block) for layer in layers]
    device, dtype = weights[0].device, weights[0].dtype
    if torch.is_autocast_enabled("cuda" if device.type == "cuda" else "cpu"):
        return "torch.autocast is on, which chooses the dtype of products"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"its weights are {dtype}, and PyTorch's products in fp8 give bfloat16 only"
    if not computes_in_fp8(device):
        return "the GPU has no matrix products in fp8, which begin with compute capability 8.9"
    odd = [side for weight in weights for side in weight.shape if side % MULTIPLE]
    return f"a layer of it has a side of {odd[0]}, which {MULTIPLE} does not divide" if odd else ""


def layers_of(block: Block) -> tuple[tuple[Linear, ...], ...]:
    """The layers that are packed together."""
    assert block.gate is not None
    assert block.up is not None
    assert block.down is not None
    return (block.query, block.key, block.value), (block.attn_out,), (block.gate, block.up), (block.down,)


def size_of_copies(parts: Parts) -> int:
    """Bytes of `copies_of`, if either all or none of the layers that are packed together have biases."""
    layers = [layer for block in parts.blocks for together in layers_of(block) for layer in together]
    biases = [tensor for layer in layers if (tensor := layer.bias) is not None]
    return sum(layer.weight.numel() + 4 * len(layer.weight) for layer in layers) + sum(bias.nbytes for bias in biases)


def copies_of(model: nn.Module, parts: Parts, thorough: bool = False) -> tuple[Fp8Block, ...]:
    """The blocks' layers in e4m3, as the weights are now.

    They take half of the weights' memory, and are kept as long as the model exists on its device, or until
    `mdkern.engine.graphs.clear`. If weights have changed they are made anew, at the same addresses.

    Args:
        thorough: whether to look for changes that PyTorch does not count, those through ``.data``, by which adapters
            are merged. All weights are then read, and the host waits for the device.
    """
    layers = [together for block in parts.blocks for together in layers_of(block)]
    blocks: tuple[Fp8Block, ...] | None = PREPARED.get(model)
    if blocks is not None and is_current(model, layers, thorough):
        return blocks
    device = parts.embedding.device
    wanted = [kinds(room(together, "meta"), device) for together in layers]
    old = [packed for block in blocks or () for packed in block]
    with torch.inference_mode(False), torch.no_grad():  # later calls may be outside of inference mode
        if [kinds(packed, packed.values.device) for packed in old] != wanted:
            PREPARED.pop(model, None)
            blocks, old = None, []  # so that their memory can be had
            old = [room(together, device) for together in layers]
        for packed, together in zip(old, layers):
            fill(packed, together)
    tensors = tensors_of(tuple(layers))
    MADE_FROM[model] = Source([(ref(tensor), version_of(tensor)) for tensor in tensors], sums_of(tensors))
    blocks = PREPARED[model] = tuple(Fp8Block(*old[first : first + 4]) for first in range(0, len(old), 4))
    return blocks


def is_current(model: nn.Module, layers: Sequence[tuple[Linear, ...]], thorough: bool) -> bool:
    """Whether the copies were made from the layers as they are now."""
    source, tensors = MADE_FROM.get(model), tensors_of(tuple(layers))
    if source is None or len(source.weights) != len(tensors):
        return False
    counted = all(
        weight() is tensor and version != UNKNOWN and version == version_of(tensor)
        for (weight, version), tensor in zip(source.weights, tensors)
    )
    return counted and not (thorough and not torch.equal(source.sums, sums_of(tensors)))


def sums_of(tensors: Sequence[Tensor]) -> Tensor:
    """int64 ``[n]``: of each tensor the sum of its bits, read as integers. One changed number changes it."""
    return torch.stack([integers_of(tensor.detach()).sum(dtype=torch.int64) for tensor in tensors])


def integers_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, of 8 bytes if they can be, so that there are few to add up."""
    places = tensor.data_ptr(), tensor.storage_offset() * tensor.element_size(), tensor.nbytes
    if tensor.is_contiguous() and not any(place % 8 for place in places):
        return tensor.view(-1).view(torch.int64)
    return tensor.view(BITS[tensor.element_size()])


def room(layers: Sequence[Linear], device: torch.device | str) -> Packed:
    """Uninitialised memory for layers in e4m3."""
    weight, columns = layers[0].weight, sum(len(layer.weight) for layer in layers)
    biased = any(layer.bias is not None for layer in layers)
    return Packed(
        torch.empty((columns, weight.shape[1]), dtype=FP8, device=device),
        torch.empty(columns, dtype=torch.float32, device=device),
        torch.empty(columns, dtype=weight.dtype, device=device) if biased else None,
    )


def fill(packed: Packed, layers: Sequence[Linear]) -> None:
    """Round the layers into their memory."""
    parts = zip(
        layers, *(tensor.split([len(layer.weight) for layer in layers]) for tensor in packed if tensor is not None)
    )
    for layer, values, scales, *biases in parts:
        rounded, scale = quantise_rows(layer.weight)
        values.copy_(rounded)
        scales.copy_(scale)
        for bias in biases:
            bias.zero_() if layer.bias is None else bias.copy_(layer.bias)


def kinds(packed: Packed, device: torch.device) -> list[object]:
    return [device, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in packed)]


class Fp8Products(Products):
    """A block's products in e4m3."""

    def __init__(self, block: Block, head_dim: int, packed: Fp8Block) -> None:
        super().__init__(block, head_dim)
        self.packed, self.dtype = packed, block.query.weight.dtype

    def gathered_norm(self, table: Tensor, index: Tensor, norm: Norm) -> tuple[Tensor, Scaled]:
        return gathered_scaled_rms_norm(table, index, *norm)

    def norm(self, x: Tensor, norm: Norm, update: Tensor | None = None) -> Scaled:
        return scaled_rms_norm(x, *norm, update=update)

    def heads(self, normed: Scaled, *, queries: bool = False, keys: bool = False) -> list[Tensor]:
        block, packed = self.block, self.packed.qkv
        sizes = [len(layer.weight) for layer in (block.query, block.key, block.value)]
        packed = packed.rows(None if queries else sizes[0], None if keys else sizes[0])
        sizes = sizes[0 if queries else 1 : 3 if keys else 1]
        skinny = runs_fp8_skinny(normed.values, packed.values)
        run = fp8_skinny_linear if skinny else scaled_linear
        products = run(normed, packed.weight, packed.bias, dtype=self.dtype).split(sizes, 1)
        return [product.unflatten(1, (-1, self.head_dim)) for product in products]

    def takes_rounded(self, normed: Scaled) -> bool:
        return self.head_dim == TILE and runs_fp8_skinny(normed.values, self.packed.attn_out.values)

    def attention_update(self, attended: Tensor | Tiled) -> Tensor:
        packed = self.packed.attn_out
        if isinstance(attended, Tiled) or runs_fp8_skinny(attended, packed.values):
            return fp8_skinny_parts(attended, packed.weight, packed.bias)
        return scaled_linear(Scaled(*quantise_rows(attended)), packed.weight, packed.bias, dtype=self.dtype)

    def mlp_update(self, normed: Scaled) -> Tensor:
        _, _, gate_up, down = self.packed
        if runs_fp8_skinny(normed.values, gate_up.values, down.values):
            return fp8_skinny_parts(fp8_skinny_swiglu(normed, gate_up.weight, gate_up.bias), down.weight, down.bias)
        gate, up = scaled_linear(normed, gate_up.weight, gate_up.bias, dtype=self.dtype).chunk(2, 1)
        return scaled_linear(scaled_swiglu(gate, up), down.weight, down.bias, dtype=self.dtype)
