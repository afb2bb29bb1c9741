"""The weights of a `DiT` in e4m3, for `dit_fused.hidden`: the projections around attention, and the MLP.

Nothing is calibrated, and no number leaves the format's range, because all that is rounded has a bound:

- The input of two of the products is a normalised row, of which no entry is larger than sqrt(D). The norm's weight and
  adaLN's modulation, which are constant, are multiplied into the weights before these are rounded.
- A hidden unit of the MLP is a product of such a row and a row of the weight, so that it is at most sqrt(D) times that
  row's norm, plus the bias (Cauchy and Schwarz). One number for each unit brings it into the range; the column of the
  next weight is divided by it. The same holds for values, of which attention gives means, and for queries and keys,
  with one number for each head.

As e4m3 has floating point, a bound that is seldom reached costs no accuracy: numbers down to 2^-14 of it keep all bits.
Attention itself is in e4m3, too, where `attention_fp8.fits`. The residual stream stays in 16 bits, as do attention and
the projections around it in the first block, the head, and the last block at the rows that are wanted. Measurements:
docs/notes/backbone.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.kernels.backbone.attention_fp8 import softmax_scale
from mdkern.kernels.backbone.quantise import (
    FP8,
    HALF_STEP,
    LARGEST,
    LEAST_NORMAL,
    SMALLEST_SCALE,
    norm_level,
    quantise_layer,
)
from mdkern.kernels.device import computes_in_fp8, has_triton

if TYPE_CHECKING:
    from mdkern.models.dit import Block, DiT

LEAST_OF_GELU = 0.18  # GELU is nowhere below minus this, whatever its input


class Quantised(NamedTuple):
    """A layer in e4m3: ``(x @ weight.T) * scale + bias``, see `mdkern.kernels.backbone.linear_fp8`."""

    weight: Tensor  # float8_e4m3fn [C, K]
    scale: Tensor  # float32 [C]
    bias: Tensor  # float32 [C]


class QuantisedAttention(NamedTuple):
    """The layers around a block's attention."""

    qkv: Quantised
    level: Tensor  # float32 [D], which attention's result is multiplied by
    out: Quantised  # the gate contained
    levelled: tuple[Tensor, Tensor]  # scale and bias of `qkv` with a result in the range of e4m3
    softmax: Tensor  # float32 [H], the scale of `attention_fp8` for that


class QuantisedBlock(NamedTuple):
    """The layers of a block whose input is in e4m3. In the first block those around attention are not among them."""

    attention: QuantisedAttention | None
    mlp_up: Quantised
    level: Tensor  # float32 [mlp_ratio * D], which the MLP's hidden units are multiplied by
    mlp_down: Quantised  # the gate contained


def why_not(model: DiT) -> str:
    """Why a model can't run with ``precision="fp8"``; "" if it can."""
    device, dtype = model.embedding.device, model.embedding.dtype
    if model.time_embedding is not None:
        return "it is conditioned on the time, so that the modulation is not constant and can't be part of the weights"
    if torch.is_autocast_enabled("cuda" if device.type == "cuda" else "cpu"):
        return "torch.autocast is on, which chooses the dtype of products: call it outside of that"
    if device.type != "cuda":
        return "" if dtype.itemsize <= 4 else f"it is of {dtype}: convert it by model.float()"
    if not has_triton(device) or not computes_in_fp8(device):
        return (
            f"{torch.cuda.get_device_name(device)} has no products in e4m3: compute capability 8.9 or later is needed"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it is of {dtype}, which is not for speed: convert it by model.bfloat16()"
    return ""


def extra_bytes(model: DiT) -> int:
    """Bytes of a model's layers in e4m3, which are kept beside its own."""
    blocks = [room(block, "meta", attention=bool(number)) for number, block in enumerate(model.blocks)]  # type: ignore[arg-type]
    return sum(tensor.nbytes for tensor in tensors_of(blocks))


def tensors_of(layers: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(layers, Tensor):
        yield layers
    for layer in layers or () if not isinstance(layers, Tensor) else ():
        yield from tensors_of(layer)


def room(block: Block, device: torch.device | str, attention: bool) -> QuantisedBlock:
    """Uninitialised memory for a block."""
    up, out, qkv = (new_layer(layer, device) for layer in (block.mlp_up, block.attn_out, block.attn_qkv))
    levelled = torch.empty_like(qkv.scale), torch.empty_like(qkv.bias)
    softmax = out.bias.new_empty(block.num_heads)
    around = QuantisedAttention(qkv, torch.empty_like(out.bias), out, levelled, softmax)
    return QuantisedBlock(
        around if attention else None, up, torch.empty_like(up.bias), new_layer(block.mlp_down, device)
    )


def new_layer(layer: nn.Linear, device: torch.device | str) -> Quantised:
    weight = torch.empty(layer.weight.shape, dtype=FP8, device=device)
    return Quantised(weight, *(weight.new_empty(len(weight), dtype=torch.float32) for _ in range(2)))


def quantise_block(block: Block, parts: tuple[Tensor, ...], out: QuantisedBlock) -> None:
    """Write a block's layers in e4m3 to `out`; `parts` are the six of its constant modulation."""
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    if out.attention is not None:
        qkv, level, projection, levelled, softmax = out.attention
        quantise_after_norm(block.attn_qkv, block.norm1.weight, shift1, scale1, qkv)
        # What attention gives are means of the values.
        most = most_of(qkv)
        level.copy_(LARGEST / most[-len(level) :])
        quantise_layer(block.attn_out.weight, block.attn_out.bias, 1 / level, gate=gate1, out=projection)
        heads = level_of_heads(most[: -len(level)], block.num_heads)
        levels = torch.cat((heads.repeat_interleave(len(level) // block.num_heads), level))
        for part, whole in zip(levelled, (qkv.scale, qkv.bias)):
            part.copy_(whole * levels)
        softmax.copy_(softmax_scale(*heads.chunk(2)))
    quantise_after_norm(block.mlp_up, block.norm2.weight, shift2, scale2, out.mlp_up)
    out.level.copy_(LARGEST / most_of_gelu(out.mlp_up))
    quantise_layer(block.mlp_down.weight, block.mlp_down.bias, 1 / out.level, gate=gate2, out=out.mlp_down)


def quantise_after_norm(layer: nn.Linear, norm: Tensor, shift: Tensor, scale: Tensor, out: Quantised) -> None:
    """A layer behind a modulated norm as one behind `quantised_norm`."""
    factor = norm.float() * (1 + scale.float()) / norm_level(len(norm))
    quantise_layer(layer.weight, layer.bias, factor, shift, out=out)


def most_of(layer: Quantised) -> Tensor:
    """A bound on each column of a layer's result, without its sign, float32 ``[C]``, over all `quantised_norm`.

    It is not 0 for a column that always is, so that one can be divided by it.
    """
    return (reach(layer) + layer.bias.abs()).clamp(min=SMALLEST_SCALE)


def level_of_heads(most: Tensor, count: int) -> Tensor:
    """What queries and keys are multiplied by, float32 ``[2 * count]``, from bounds on them before they are rotated."""
    pairs = most.view(2 * count, 2, -1)  # two numbers that are turned into each other
    return LARGEST / torch.linalg.vector_norm(pairs, dim=1).amax(1)


def most_of_gelu(up: Quantised) -> Tensor:
    """A bound on ``|gelu(up)|`` of each hidden unit, as `most_of`."""
    return (reach(up) + up.bias).clamp(min=LEAST_OF_GELU)


def reach(layer: Quantised) -> Tensor:
    """The most that a layer adds to its bias: the norm of its weight's row times that of the input."""
    width = layer.weight.shape[1]
    rounding = HALF_STEP * (norm_level(width) + LEAST_NORMAL)  # of an entry of the norm, relative to 1
    longest = math.sqrt(width) * (norm_level(width) + rounding)
    return longest * torch.linalg.vector_norm(layer.weight.float(), dim=1) * layer.scale
