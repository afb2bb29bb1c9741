"""`attention_fp8`: attention of queries, keys and values in e4m3, for many sequences on a Hopper GPU.

The weights of the values are in e4m3, too, and found without an exponential (`weights_of`). Tensor cores multiply
matrices in e4m3 only where the summed dimension is contiguous in both, so that values lie transposed; and an
accumulator's registers hold other columns than a left operand's, so that tokens lie in an order by which none of them
has to move. `linear_fp8.scaled_heads` writes both. This file has the contract and the reference in plain PyTorch.
Times: docs/notes/backbone.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdkern.kernels.backbone.attention import HEAD_DIM
from mdkern.kernels.backbone.linear import COLUMN_TILE
from mdkern.kernels.backbone.quantise import FP8, rounded
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.device import is_hopper
from mdkern.kernels.invariant import is_batch_invariant
from mdkern.kernels.operator import operator

TOKENS = 128  # of which L is a multiple
LIFT = 8.0  # weights are at most 2 to this before they are rounded, so that small ones keep their bits


def in_order(values: Tensor) -> Tensor:
    """Values ``[..., L]`` with the tokens of each 32 as the kernel reads them: 0, 1, 8, 9, 2, 3, 10, 11, ..."""
    return values.unflatten(-1, (-1, 2, 2, 4, 2)).transpose(-3, -2).flatten(-5)


def as_before(ordered: Tensor) -> Tensor:
    """What `in_order` was given."""
    return ordered.unflatten(-1, (-1, 2, 4, 2, 2)).transpose(-3, -2).flatten(-5)


def weights_of(exponent: Tensor) -> Tensor:
    """About ``2 ** (exponent + LIFT)`` in e4m3: before rounding up to 6 % too large between powers of two.

    A number's code in e4m3 is ``8 * (log2(number) + 7)`` at powers of two, and runs straight between them (Schraudolph,
    Neural Computation 11(4), 1999). Exponents are at most 0; what is below the format's range becomes 0.
    """
    return (8 * (exponent + LIFT + 7)).clamp(min=0).round().to(torch.uint8).view(FP8)


def attention_fp8_reference(heads: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`attention_fp8` in plain PyTorch."""
    count, length = len(scale), values.shape[1]
    query, key = heads.float().view(-1, length, 2, count, HEAD_DIM).unbind(2)
    value = as_before(values.float()).view(-1, count, HEAD_DIM, length)
    exponent = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale[:, None, None]
    weight = weights_of(exponent - exponent.amax(-1, keepdim=True).ceil()).float()
    attended = torch.einsum("bhqk,bhdk->bqhd", weight, value) / weight.sum(-1).transpose(1, 2)[..., None]
    return rounded(attended.flatten(2).flatten(0, 1))


attention_fp8_operator = operator(
    attention_fp8_reference,
    lambda heads, *_: heads.new_empty(len(heads), heads.shape[1] // 2),
    "mdkern.kernels.backbone.launch_attention_fp8:attention_fp8",
    name="attention_fp8",
)


def fits(device: torch.device, length: int, width: int, head_dim: int) -> bool:
    """Whether `attention_fp8` is the faster way for sequences of this length that nothing is hidden in.

    It is not where no kernel writes what it reads, and not used in the batch-invariant mode, where a sequence may be
    among longer ones, whose rest is hidden.
    """
    runs = device.type == "cpu" or (is_hopper(device) and 3 * width % COLUMN_TILE == 0)
    return runs and head_dim == HEAD_DIM and length % TOKENS == 0 and not is_batch_invariant()


def softmax_scale(query_level: Tensor, key_level: Tensor) -> Tensor:
    """The `scale` of `attention_fp8` for heads whose queries and keys were multiplied by levels."""
    return HEAD_DIM**-0.5 / math.log(2) / (query_level * key_level)


def attention_fp8(
    heads: Tensor,  # [B * L, 2 * H * 64]
    values: Tensor,  # [B * H * 64, L]
    scale: Tensor,  # [H]
) -> Tensor:
    """Means of values, weighted by ``softmax(query @ key.T)``, of each sequence and head (2307.08691).

    Among GPUs only Hopper has a kernel for it, see `fits`.

    Args:
        heads: float8_e4m3fn ``[B * L, 2 * H * 64]``, queries and keys.
        values: float8_e4m3fn ``[B * H * 64, L]``, those of each dimension `in_order` of the tokens; L is a multiple of
            128.
        scale: float32 ``[H]``, the scale of a head's products times ``log2(e)``, see `softmax_scale`.

    Returns:
        float8_e4m3fn ``[B * L, H * 64]``: multiplied by what the values had been multiplied by.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_tensor("scale", scale, scale.shape[:1], torch.float32, heads.device)
    if heads.ndim != 2 or values.ndim != 2:
        raise ValueError(f"heads and values must be matrices, not {list(heads.shape)} and {list(values.shape)}")
    rows, length, width = len(heads), values.shape[1], len(scale) * HEAD_DIM
    if not length or length % TOKENS or rows % length:
        raise ValueError(f"heads {list(heads.shape)} and values {list(values.shape)} are not of sequences of {TOKENS}s")
    check_tensor("heads", heads, (rows, 2 * width), FP8, heads.device)
    check_tensor("values", values, (rows // length * width, length), FP8, heads.device)
    if not (heads.is_contiguous() and values.is_contiguous() and scale.is_contiguous()):
        raise ValueError("heads, values and scale must be contiguous")
    attended: Tensor = attention_fp8_operator(heads, values, scale)
    return attended
