"""`mdkern.kernels.backbone.swiglu` in Triton."""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.scaled_linear import new_scaled
from mdkern.kernels.backbone.swiglu import scaled_swiglu_reference, swiglu_output, swiglu_reference
from mdkern.kernels.backbone.triton_scaled import scale_and_inverse
from mdkern.kernels.device import computes_in_fp8

MOST_COLUMNS = 1 << 15  # of a row that one program holds
COLUMNS = 1024  # of a program: 16 bytes of each operand a thread


@triton.jit
def swiglu_kernel(gate, up, out, columns, gate_stride, up_stride, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=within, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=within, other=0.0).to(tl.float32)
    curved = g
    if not SILU:
        curved = 1.5957691216057308 * (g + 0.044715 * g * g * g)  # 2 sqrt(2 / pi)
    product = g * tl.sigmoid(curved) * u
    tl.store(out + row * columns + column, product.to(out.dtype.element_ty), mask=within)


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`swiglu` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if gate.dtype == torch.float64:
        return swiglu_reference(gate, up, activation)
    return swiglu_into(swiglu_output(gate), gate, up, activation)


def swiglu_into(out: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The same, written to `out`, which is contiguous."""
    rows, columns = out.shape
    if rows and columns:
        grid = rows, triton.cdiv(columns, COLUMNS)
        constants = {"SILU": activation == "silu", "BLOCK": COLUMNS, "num_warps": 4}
        swiglu_kernel[grid](gate, up, out, columns, gate.stride(0), up.stride(0), **constants)
    return out


@triton.jit
def scaled_swiglu_kernel(gate, up, values, scales, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    g = tl.load(gate + row * gate_stride + column, mask=within, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=within, other=0.0).to(tl.float32)
    product = g * tl.sigmoid(g) * u
    scale, inverse = scale_and_inverse(tl.max(tl.abs(product), 0))
    tl.store(scales + row, scale)
    tl.store(values + row * WIDTH + column, (product * inverse).to(values.dtype.element_ty), mask=within)


def warps_of(width: int) -> int:
    """Of a program that holds a row of so many columns."""
    return min(32, max(1, triton.next_power_of_2(width) // 512))


def scaled_swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`scaled_swiglu` on a GPU (or, on the CPU, in Triton's interpreter): each program holds a row."""
    if gate.dtype == torch.float64 or gate.shape[1] > MOST_COLUMNS or not computes_in_fp8(gate.device):
        return scaled_swiglu_reference(gate, up)
    values, scales = new_scaled(gate)
    rows, width = gate.shape
    if rows and width:
        block = triton.next_power_of_2(width)
        scaled_swiglu_kernel[(rows,)](
            gate, up, values, scales, gate.stride(0), up.stride(0), WIDTH=width, BLOCK=block, num_warps=warps_of(width)
        )
    return values, scales
