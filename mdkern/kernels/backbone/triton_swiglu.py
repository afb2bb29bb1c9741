"""`mdkern.kernels.backbone.swiglu` in Triton."""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.swiglu import swiglu_output, swiglu_reference

COLUMNS = 1024  # of a program: 16 bytes of each operand a thread


@triton.jit
def swiglu_kernel(gate, up, out, columns, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=within, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=within, other=0.0).to(tl.float32)
    product = g * tl.sigmoid(g) * u
    tl.store(out + row * columns + column, product.to(out.dtype.element_ty), mask=within)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if gate.dtype == torch.float64:
        return swiglu_reference(gate, up)
    out = swiglu_output(gate)
    rows, columns = out.shape
    if rows and columns:
        grid = rows, triton.cdiv(columns, COLUMNS)
        swiglu_kernel[grid](gate, up, out, columns, gate.stride(0), up.stride(0), BLOCK=COLUMNS, num_warps=4)
    return out
