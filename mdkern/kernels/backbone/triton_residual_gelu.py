"""`mdkern.kernels.backbone.residual_gelu` in Triton: each program has whole rows and some of the hidden units."""

# mypy: ignore-errors
# ruff: noqa: N803, RUF005  (Triton adds tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mdkern.kernels.backbone.norm_constants import EPS
from mdkern.kernels.backbone.residual_gelu import PART, UNITS, residual_gelu_reference
from mdkern.kernels.backbone.triton_linear import _gelu
from mdkern.kernels.device import launches_early


class Tiling(NamedTuple):
    """Of a program: rows, hidden units, warps."""

    rows: int
    units: int
    warps: int


TILING = Tiling(64, UNITS, 8)


@triton.jit(do_not_specialize=["rows"])
def residual_gelu_kernel(
    stream,
    x,
    weight,
    gate,
    up,
    up_bias,
    updated,
    hidden,
    rows,  # N
    eps,
    PARTS: tl.constexpr,  # of the width, each of PART columns
    PART: tl.constexpr,
    HIDDEN: tl.constexpr,  # F
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    WIDTH: tl.constexpr = PARTS * PART  # noqa: N806
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column, unit = tl.arange(0, PART), tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    real = (row < rows)[:, None]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    rights = ()
    for part in tl.static_range(PARTS):  # no kernel before this one writes weights, so they need not wait for it
        rights = rights + (tl.load(up + unit[:, None] * WIDTH + part * PART + column[None, :]),)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    lefts = ()
    held = ()
    for part in tl.static_range(PARTS):
        lefts = lefts + (tl.load(x + at + part * PART, mask=real, other=0.0),)
        held = held + (tl.load(stream + at + part * PART, mask=real, other=0.0),)
    total = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    rounded = ()
    for to in tl.static_range(PARTS):
        product = tl.zeros([ROWS, PART], tl.float32)
        for part in tl.static_range(PARTS):
            right = tl.load(weight + (column + to * PART)[:, None] * WIDTH + part * PART + column[None, :])
            product = tl.dot(lefts[part], right.T, product)
        opened = tl.load(gate + to * PART + column).to(tl.float32)
        full = held[to].to(tl.float32) + opened[None, :] * product
        total += tl.sum(full, 1)
        squares += tl.sum(full * full, 1)
        rounded = rounded + (full.to(stream.dtype.element_ty),)
        if tl.program_id(0) == 0:
            tl.store(updated + at + to * PART, rounded[to], mask=real)
    mean = total / WIDTH
    spread = tl.rsqrt(tl.maximum(squares / WIDTH - mean * mean, 0.0) + eps)
    units = tl.zeros([ROWS, UNITS], tl.float32)
    for part in tl.static_range(PARTS):
        units = tl.dot(rounded[part], rights[part].T, units)
    units = _gelu(units * spread[:, None] + tl.load(up_bias + unit).to(tl.float32)[None, :], FAST)
    write = hidden + row.to(tl.int64)[:, None] * HIDDEN + unit[None, :]
    tl.store(write, units.to(hidden.dtype.element_ty), mask=real)


def residual_gelu(
    stream: Tensor, x: Tensor, weight: Tensor, gate: Tensor, up: Tensor, up_bias: Tensor, tiling: Tiling = TILING
) -> tuple[Tensor, Tensor]:
    """`residual_gelu` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if stream.dtype not in (torch.bfloat16, torch.float16) and stream.is_cuda:
        return residual_gelu_reference(stream, x, weight, gate, up, up_bias)
    (rows, width), units = stream.shape, len(up)
    updated, hidden = torch.empty_like(stream), stream.new_empty(rows, units)
    early = launches_early(stream.device)
    if rows:
        residual_gelu_kernel[(units // tiling.units, triton.cdiv(rows, tiling.rows))](
            stream,
            x,
            weight,
            gate,
            up,
            up_bias,
            updated,
            hidden,
            rows,
            EPS,
            PARTS=width // PART,
            PART=PART,
            HIDDEN=units,
            ROWS=tiling.rows,
            UNITS=tiling.units,
            FAST=stream.is_cuda,
            PDL=early,
            num_warps=tiling.warps,
            launch_pdl=early,
        )
    return updated, hidden
