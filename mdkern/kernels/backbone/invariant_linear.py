"""`invariant_linear`: a matrix product whose rows do not depend on how many there are.

This file has the contract and the reference in plain PyTorch; `triton_invariant_linear` is the GPU kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.operator import operator


def invariant_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`invariant_linear` in plain PyTorch, of rows ``[N, K]``."""
    return F.linear(x, weight, bias)


invariant_linear_operator = operator(
    invariant_linear_reference,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    "mdkern.kernels.backbone.triton_invariant_linear:invariant_linear",
    name="invariant_linear",
)


def invariant_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, with the arguments of PyTorch's `linear`.

    On a GPU the bits of a row depend on that row, the weight and the bias only. On the CPU it is PyTorch's product.

    Args:
        input: floating ``[..., K]``, of 16 or 32 bits on a GPU.
        weight: same dtype, ``[C, K]``.
        bias: same dtype, ``[C]``.

    Returns:
        ``[..., C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if weight.ndim != 2 or not input.ndim or input.shape[-1] != weight.shape[1] or input.dtype != weight.dtype:
        raise ValueError(
            f"weight must be {input.dtype} [C, {input.shape[-1] if input.ndim else 'K'}], not {weight.dtype}"
            f" {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must be {weight.dtype} [{weight.shape[0]}], not {bias.dtype} {list(bias.shape)}")
    if input.is_cuda and input.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"input must be bfloat16, float16 or float32 on a GPU, not {input.dtype}")
    product: Tensor = invariant_linear_operator(input.reshape(-1, input.shape[-1]), weight, bias)
    return product.view(*input.shape[:-1], weight.shape[0])
