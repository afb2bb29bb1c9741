"""The products of `kernels.backbone.linear` of matrices in e4m3 (`kernels.backbone.quantise`).

Each multiplies the product by a number for each output channel, in which the scale of the weight's row and that of the
input are contained. On a Hopper GPU the kernels are those of the 16-bit products; elsewhere the reference runs, on GPUs
with PyTorch's own product of e4m3 matrices. Measurements: docs/notes/backbone.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.attention_fp8 import TOKENS, in_order
from mdkern.kernels.backbone.linear import COLUMN_TILE, FEWEST_ROWS, product_of, rotates_fused
from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.quantise import FP8, rounded
from mdkern.kernels.backbone.rotary import check_angles, check_heads, check_length, rotary
from mdkern.kernels.checks import check_tensor, check_written
from mdkern.kernels.device import copies_in_bulk, is_hopper
from mdkern.kernels.invariant import is_batch_invariant, rows_to_choose_by
from mdkern.kernels.operator import operator

WHOLE = 16  # PyTorch's product needs multiples of it as numbers of rows and columns of the weight


def scaled_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``(x @ weight.T) * scale + bias`` in float32."""
    whole = not (weight.shape[0] % WHOLE or weight.shape[1] % WHOLE)
    if x.is_cuda and whole and not is_batch_invariant() and hasattr(torch, "_scaled_mm"):  # a private name
        one = torch.ones((), device=x.device)
        product = torch._scaled_mm(x, weight.T, one, one, out_dtype=torch.float32, use_fast_accum=True)
    else:  # numbers of e4m3 are numbers of bfloat16, too
        dtype = torch.bfloat16 if x.is_cuda else torch.float32
        product = product_of(x.to(dtype), weight.to(dtype)).float()
    return product * scale + bias


def scaled_rotary_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    """`scaled_rotary` in plain PyTorch."""
    product = scaled_product(x, weight, scale, bias).to(dtype)
    rotary(product.view(x.shape[0], -1, 2 * cos.shape[1])[:, :heads], cos, sin, length=length)
    return product


def scaled_heads_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """`scaled_heads` in plain PyTorch."""
    width = len(weight) // 3
    heads, values = scaled_product(x, weight, scale, bias).split(2 * width, dim=1)
    heads = heads.contiguous()
    rotary(heads.unflatten(1, (-1, 2 * cos.shape[1])), cos, sin, length=length)
    return rounded(heads), in_order(rounded(values.unflatten(0, (-1, length)).transpose(1, 2).flatten(0, 1)))


def scaled_gelu_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, level: Tensor) -> Tensor:
    """`scaled_gelu` in plain PyTorch."""
    return rounded(F.gelu(scaled_product(x, weight, scale, bias), approximate="tanh") * level)


def scaled_residual_reference(stream: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
    """`scaled_residual` in plain PyTorch."""
    stream.copy_(stream.to(wide(stream)) + scaled_product(x, weight, scale, bias))


def runs_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether a Hopper kernel runs the product, as `kernels.backbone.linear.runs_fused` of 16 bits."""
    return (
        is_hopper(x.device)
        and rows_to_choose_by(x.shape[0]) >= FEWEST_ROWS
        and weight.shape[0] % COLUMN_TILE == 0
        and copies_in_bulk(x)
        and copies_in_bulk(weight)
    )


def scaled_rotary_on_gpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    if not runs_fused(x, weight) or not rotates_fused(cos, heads):
        return scaled_rotary_reference(x, weight, scale, bias, cos, sin, heads, length, dtype)
    from mdkern.kernels.backbone import launch_linear

    out = new_product(x, weight, dtype)
    rotated = heads * 2 * cos.shape[1]
    launch_linear.linear(x, weight, out, bias=bias, cos=cos, sin=sin, length=length, rotated=rotated, scale=scale)
    return out


def scaled_heads_on_gpu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    width = len(weight) // 3
    if not runs_fused(x, weight) or not rotates_fused(cos, 2 * width // (2 * cos.shape[1])):
        return scaled_heads_reference(x, weight, scale, bias, cos, sin, length)
    from mdkern.kernels.backbone import launch_linear

    heads, values = new_heads(x, weight, length)
    launch_linear.linear(
        x, weight, heads, bias=bias, cos=cos, sin=sin, length=length, rotated=2 * width, scale=scale, values=values
    )
    return heads, values


def new_heads(x: Tensor, weight: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Uninitialised tensors for what `scaled_heads` returns."""
    rows, width = len(x), len(weight) // 3
    return x.new_empty(rows, 2 * width), x.new_empty(rows // length * width, length)


def scaled_gelu_on_gpu(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, level: Tensor) -> Tensor:
    if not runs_fused(x, weight):
        return scaled_gelu_reference(x, weight, scale, bias, level)
    from mdkern.kernels.backbone import launch_linear

    out = new_product(x, weight, FP8)
    if launch_linear.stays_resident(x):
        launch_linear.resident_gelu(x, weight, out, bias=bias, scale=scale, level=level)
    else:
        launch_linear.linear(x, weight, out, bias=bias, gelu=True, scale=scale, level=level)
    return out


def scaled_residual_on_gpu(stream: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
    if not runs_fused(x, weight):
        scaled_residual_reference(stream, x, weight, scale, bias)
        return
    from mdkern.kernels.backbone import launch_linear

    launch_linear.linear_residual(stream, x, weight, bias, scale, None, scaled=True)


def new_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for ``x @ weight.T``."""
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


HERE = "mdkern.kernels.backbone.linear_fp8"
scaled_rotary_operator = operator(
    scaled_rotary_reference,
    lambda x, weight, *rest: new_product(x, weight, rest[-1]),
    f"{HERE}:scaled_rotary_on_gpu",
    name="scaled_rotary",
)
scaled_heads_operator = operator(
    scaled_heads_reference,
    lambda x, weight, *rest: new_heads(x, weight, rest[-1]),
    f"{HERE}:scaled_heads_on_gpu",
    name="scaled_heads",
)
scaled_gelu_operator = operator(
    scaled_gelu_reference,
    lambda x, weight, *_: new_product(x, weight, FP8),
    f"{HERE}:scaled_gelu_on_gpu",
    name="scaled_gelu",
)
scaled_residual_operator = operator(
    scaled_residual_reference,
    lambda *_: None,
    f"{HERE}:scaled_residual_on_gpu",
    mutates=("stream",),
    name="scaled_residual",
)


def scaled_rotary(
    x: Tensor,  # [N, K]
    weight: Tensor,  # [C, K]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    cos: Tensor,  # [P, head_dim / 2]
    sin: Tensor,  # [P, head_dim / 2]
    *,
    heads: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    """``(x @ weight.T) * scale + bias`` with rotary embedding of the first `heads` heads, as `linear_rotary`.

    Args:
        x: float8_e4m3fn ``[N, K]``.
        weight: float8_e4m3fn ``[C, K]``.
        scale, bias: float32 ``[C]``.
        cos, sin, heads, length: as for `mdkern.kernels.backbone.linear.linear_rotary`.
        dtype: of the result.

    Returns:
        ``[N, C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_scaled(x, weight, scale, bias)
    check_angles(x.new_empty(0, dtype=dtype), sin.shape[-1], cos, sin)
    check_heads(heads, weight.shape[0], cos)
    check_length(length, cos)
    product: Tensor = scaled_rotary_operator(x, weight, scale, bias, cos, sin, heads, length, dtype)
    return product


def scaled_heads(
    x: Tensor,  # [B * L, K]
    weight: Tensor,  # [3 * D, K]
    scale: Tensor,  # [3 * D]
    bias: Tensor,  # [3 * D]
    cos: Tensor,  # [P, head_dim / 2]
    sin: Tensor,  # [P, head_dim / 2]
    *,
    length: int,
) -> tuple[Tensor, Tensor]:
    """``(x @ weight.T) * scale + bias`` in e4m3: queries and keys, rotated, and values for `attention_fp8`.

    What is beyond the range of e4m3 becomes 448: `scale` and `bias` must bring it inside.

    Args:
        x, weight, scale, bias: as for `scaled_rotary`.
        cos, sin: as for `mdkern.kernels.backbone.linear.linear_rotary`.
        length: L, of each sequence, a multiple of 128.

    Returns:
        float8_e4m3fn ``[B * L, 2 * D]``, queries and keys; and ``[B * D, L]``, values in the order of
        `attention_fp8.in_order`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_scaled(x, weight, scale, bias)
    check_angles(x.new_empty(0, dtype=torch.float32), sin.shape[-1], cos, sin)
    if len(weight) % 3:
        raise ValueError(f"weight must be of queries, keys and values, not of {len(weight)} columns")
    check_heads(0, len(weight) // 3, cos)
    check_length(length, cos)
    if length % TOKENS or len(x) % length:
        raise ValueError(f"{len(x)} rows are not of sequences of {length}, a multiple of {TOKENS}")
    heads, values = scaled_heads_operator(x, weight, scale, bias, cos, sin, length)
    return heads, values


def scaled_gelu(
    x: Tensor,  # [N, K]
    weight: Tensor,  # [C, K]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    level: Tensor,  # [C]
) -> Tensor:
    """``gelu((x @ weight.T) * scale + bias) * level`` in the tanh form, in e4m3.

    Args:
        x, weight, scale, bias: as for `scaled_rotary`.
        level: float32 ``[C]``, which brings each column into the range of e4m3. What is beyond it becomes 448.

    Returns:
        float8_e4m3fn ``[N, C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_scaled(x, weight, scale, bias)
    check_vector("level", level, weight)
    product: Tensor = scaled_gelu_operator(x, weight, scale, bias, level)
    return product


def scaled_residual(
    stream: Tensor,  # [N, C]
    x: Tensor,  # [N, K]
    weight: Tensor,  # [C, K]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
) -> None:
    """``stream += (x @ weight.T) * scale + bias`` in place, rounded once.

    Args:
        stream: floating ``[N, C]``, contiguous.
        x, weight, scale, bias: as for `scaled_rotary`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_scaled(x, weight, scale, bias)
    check_tensor(
        "stream", stream, (x.shape[0], weight.shape[0]), (torch.bfloat16, torch.float16, torch.float32), x.device
    )
    check_written("stream", stream)
    scaled_residual_operator(stream, x, weight, scale, bias)


def check_scaled(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> None:
    check_tensor("x", x, x.shape, FP8, x.device)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"weight must be [C, {x.shape[-1]}] for x {list(x.shape)}, not {list(weight.shape)}")
    check_tensor("weight", weight, weight.shape, FP8, x.device)
    check_vector("scale", scale, weight)
    check_vector("bias", bias, weight)


def check_vector(name: str, vector: Tensor, weight: Tensor) -> None:
    check_tensor(name, vector, weight.shape[:1], torch.float32, weight.device)
    if not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of strides {vector.stride()}")
