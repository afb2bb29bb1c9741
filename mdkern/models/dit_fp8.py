"""The weights of a `DiT` in e4m3, for `dit_fused.hidden`: queries, keys and values, and the MLP.

Nothing is calibrated, and no number leaves the format's range, because all that is rounded has a bound:

- The input of two of the products is a normalised row, of which no entry is larger than sqrt(D). The norm's weight and
  adaLN's modulation, which are constant, are multiplied into the weights before these are rounded.
- A hidden unit of the MLP is a product of such a row and a row of the weight, so that it is at most sqrt(D) times that
  row's norm, plus the bias (Cauchy and Schwarz). One number for each unit brings it into the range; the column of the
  next weight is divided by it.

As e4m3 has floating point, a bound that is seldom reached costs no accuracy: numbers down to 2^-15 of it keep all bits.
What adds to the residual stream stays in 16 bits, as do attention, its output projection, the head, the first block's
queries, keys and values, and the last block at the rows that are wanted. Measurements: docs/notes/backbone.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.kernels.backbone.quantise import FP8, HALF_STEP, LARGEST, LEAST_NORMAL, norm_level, quantise_rows
from mdkern.kernels.device import computes_in_fp8, has_triton

if TYPE_CHECKING:
    from mdkern.models.dit import Block, DiT

LEAST_OF_GELU = 0.18  # GELU is nowhere below minus this, whatever its input


class Quantised(NamedTuple):
    """A layer in e4m3: ``(x @ weight.T) * scale + bias``, see `mdkern.kernels.backbone.linear_fp8`."""

    weight: Tensor  # float8_e4m3fn [C, K]
    scale: Tensor  # float32 [C]
    bias: Tensor  # float32 [C]


class QuantisedBlock(NamedTuple):
    """The layers of a block whose input is in e4m3. In the first block the first one is not among them."""

    attn_qkv: Quantised | None
    mlp_up: Quantised
    level: Tensor  # float32 [mlp_ratio * D], which the MLP's hidden units are multiplied by
    mlp_down: Quantised  # the gate contained


def why_not(model: DiT) -> str:
    """Why a model can't run with ``precision="fp8"``; "" if it can."""
    device, dtype = model.embedding.device, model.embedding.dtype
    if model.time_embedding is not None:
        return "it is conditioned on the time, so that the modulation is not constant and can't be part of the weights"
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
    blocks = [room(block, "meta", with_qkv=bool(number)) for number, block in enumerate(model.blocks)]  # type: ignore[arg-type]
    layers = [
        tensor for block in blocks for layer in block for tensor in (layer if isinstance(layer, tuple) else [layer])
    ]
    return sum(tensor.nbytes for tensor in layers if tensor is not None)


def room(block: Block, device: torch.device | str, with_qkv: bool) -> QuantisedBlock:
    """Uninitialised memory for a block."""
    up = new_layer(block.mlp_up, device)
    return QuantisedBlock(
        new_layer(block.attn_qkv, device) if with_qkv else None,
        up,
        torch.empty_like(up.bias),
        new_layer(block.mlp_down, device),
    )


def new_layer(layer: nn.Linear, device: torch.device | str) -> Quantised:
    weight = torch.empty(layer.weight.shape, dtype=FP8, device=device)
    return Quantised(weight, *(weight.new_empty(len(weight), dtype=torch.float32) for _ in range(2)))


def quantise_block(block: Block, parts: tuple[Tensor, ...], out: QuantisedBlock) -> None:
    """Write a block's layers in e4m3 to `out`; `parts` are the six of its constant modulation."""
    shift1, scale1, _, shift2, scale2, gate2 = parts
    if out.attn_qkv is not None:
        quantise_after_norm(block.attn_qkv, block.norm1.weight, shift1, scale1, out.attn_qkv)
    quantise_after_norm(block.mlp_up, block.norm2.weight, shift2, scale2, out.mlp_up)
    out.level.copy_(LARGEST / most_of_gelu(out.mlp_up))
    weight, scale, bias = out.mlp_down
    quantised = quantise_rows(block.mlp_down.weight.float() / out.level)
    weight.copy_(quantised[0])
    torch.mul(quantised[1], gate2, out=scale)
    torch.mul(block.mlp_down.bias.float(), gate2, out=bias)


def quantise_after_norm(layer: nn.Linear, norm: Tensor, shift: Tensor, scale: Tensor, out: Quantised) -> None:
    """A layer behind a modulated norm as one behind `quantised_norm`."""
    full = layer.weight.float()
    quantised = quantise_rows(full * (norm * (1 + scale.float())))
    out.weight.copy_(quantised[0])
    torch.div(quantised[1], norm_level(full.shape[1]), out=out.scale)
    torch.mv(full, shift.float(), out=out.bias)
    if layer.bias is not None:
        out.bias.add_(layer.bias)


def most_of_gelu(up: Quantised) -> Tensor:
    """A bound on ``|gelu(up)|`` of each hidden unit, float32 ``[C]``, over all rows of `quantised_norm`."""
    width = up.weight.shape[1]
    longest = math.sqrt(width) * (
        norm_level(width) * (1 + HALF_STEP) + LEAST_NORMAL * HALF_STEP
    )  # a rounded row's norm
    reach = longest * torch.linalg.vector_norm(up.weight.float(), dim=1) * up.scale
    return (reach + up.bias).clamp(min=LEAST_OF_GELU)
