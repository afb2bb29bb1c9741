"""`mdkern.kernels.backbone.scaled_linear` on a GPU, by CUTLASS as PyTorch has it."""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.backbone.scaled_linear import scaled_linear_reference
from mdkern.kernels.device import computes_in_fp8


def scaled_linear(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`scaled_linear` on a GPU."""
    if not computes_in_fp8(values.device):
        return scaled_linear_reference(values, scales, weight, weight_scales, bias, dtype)
    if not len(values):
        return values.new_empty(0, len(weight), dtype=dtype)
    product = torch._scaled_mm(
        values,
        weight.T,
        scale_a=scales[:, None],
        scale_b=weight_scales[None],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # it has no other one with scales of rows
        use_fast_accum=True,
    )
    return product.to(dtype)
