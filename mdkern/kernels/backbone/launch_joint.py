"""Launches `hopper_joint`: describes matrices to TMA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels.backbone import skinny, triton_skinny
from mdkern.kernels.backbone.hopper_joint import PIECE, TOGETHER, joint_kernel
from mdkern.kernels.backbone.joint import (
    INNER,
    fits,
    is_near,
    joint_parts_reference,
    new_joint_parts,
    new_linear,
    new_swiglu,
    runs_early,
)
from mdkern.kernels.backbone.joint_tiles import BLOCK, IN_PARTS, Tiling, choose_tiling
from mdkern.kernels.backbone.launch_linear import describe
from mdkern.kernels.backbone.skinny import SPLITS
from mdkern.kernels.device import is_hopper, num_sms
from mdkern.kernels.head.launch_hopper import ELEMENT

GROUP = 8  # row tiles that take all columns before the next ones begin
SHARED_MEMORY = 226 * 1024  # bytes of a program, without its barriers


def stages_of(tiling: Tiling, gated: bool) -> int:
    """As many steps of 16-bit numbers as shared memory holds beside the output's buffers."""
    buffers = max(2, tiling.blocks) * 2 * math.prod(stored_block(tiling, gated))
    return (SHARED_MEMORY - buffers) // (2 * INNER * (BLOCK * tiling.blocks + tiling.rows))


def setting(tiling: Tiling, gated: bool) -> dict[str, Any]:
    """Constants and compiler options of a tiling."""
    constants = {"BLOCKS": tiling.blocks, "TALL": tiling.rows, "BK": INNER, "GATED": gated}
    constants["STAGES"] = stages_of(tiling, gated)
    # Registers of a consumer thread, and of every thread at the launch.
    registers, launched = (160, 128) if tiling.blocks == 3 else (240, 168)
    return constants | {"REGISTERS": registers, "maxnreg": launched, "num_warps": 4}


def pair_block() -> list[int]:
    """Of gate and up as one tensor, what is copied at a time."""
    return [BLOCK // (2 * TOGETHER.value), 2, TOGETHER.value, INNER]


def stored_block(tiling: Tiling, gated: bool) -> list[int]:
    """Of the output, what is stored at a time: rows and columns."""
    rows = tiling.rows // 2 if tiling.blocks == 1 else tiling.rows
    return [min(PIECE.value, rows), BLOCK // 2 if gated else BLOCK]


def describe_pair(gate: Tensor, up: Tensor) -> tuple[TensorDescriptor, bool]:
    """Gate and up as one tensor ``[groups of 8 rows, 2, 8, K]``, and whether up is the first of the two."""
    swapped = up.data_ptr() < gate.data_ptr()
    base, other = (up, gate) if swapped else (gate, up)
    rows, depth = base.shape
    block = pair_block()
    distance = (other.data_ptr() - base.data_ptr()) // base.element_size()
    strides = [TOGETHER.value * depth, distance, depth, 1]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENT[base.dtype])
    return TensorDescriptor(base, [rows // TOGETHER.value, 2, TOGETHER.value, depth], strides, block, layout), swapped


def launch(
    x: Tensor,
    weights: list[Tensor],
    biases: Sequence[Tensor | None],
    out: Tensor,
    gated: bool,
    tiling: Tiling | None = None,
    parts: int = 1,
) -> Tensor:
    if not out.numel():
        return out
    programs = num_sms(x.device)
    tiling = tiling or choose_tiling(x.shape[0], sum(map(len, weights)), programs)
    whole = triton_skinny.whole_biases(x, weights, biases)
    # Biases that were written just now must not be read before the kernel that writes them has ended.
    written = any(one is not given for one, given in zip(whole, biases, strict=True))
    early = not written and (parts > 1 or runs_early(len(x), x.shape[1], x.device))
    missing = [None] * (3 - len(weights))
    swapped = False
    if gated:
        pair, swapped = describe_pair(*weights)
        described = [pair, None]
    else:
        described = [describe(weight, [BLOCK, INNER]) for weight in weights]
    ends = [out.shape[1]] * 3 if gated else list(accumulate(map(len, weights)))
    stored = stored_block(tiling, gated)
    joint_kernel[(programs,)](
        *described,
        *missing,
        describe(x, [tiling.rows, INNER]),
        describe(out, stored),
        *whole,
        *missing,
        *(ends + ends[-1:] * 2)[:3],
        triton.cdiv(x.shape[0], tiling.rows),
        triton.cdiv(out.shape[1], stored[1] * tiling.blocks),
        triton.cdiv(x.shape[1], INNER) // parts,
        int(swapped),
        GROUP=GROUP,
        PROGRAMS=programs,
        PARTS=parts,
        EARLY=early,
        launch_pdl=early,
        **setting(tiling, gated),
    )
    return out


def joint_linear(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    third_bias: Tensor | None,
) -> Tensor:
    """`joint_linear` on a GPU."""
    weights = [weight for weight in (first, second, third) if weight is not None]
    biases = [first_bias, second_bias, third_bias]
    if not (is_hopper(x.device) and fits(x, *weights)) or is_skinny(x, weights):
        return triton_skinny.skinny_linear(x, first, second, third, *biases)
    return launch(x, weights, biases[: len(weights)], new_linear(x, first, second, third), gated=False)


def joint_swiglu(x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """`joint_swiglu` on a GPU."""
    if not (is_hopper(x.device) and fits(x, gate, up) and is_near(gate, up)) or is_skinny(x, [gate, up]):
        return triton_skinny.skinny_swiglu(x, gate, up, gate_bias, up_bias)
    return launch(x, [gate, up], [gate_bias, up_bias], new_swiglu(x, gate), gated=True)


def joint_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of `joint_parts` on a GPU, with the rows of whole tiles."""
    if not (is_hopper(x.device) and fits(x, weight) and x.shape[1] % (SPLITS * INNER) == 0):
        return joint_parts_reference(x, weight, bias)
    out = new_joint_parts(x, weight)
    launch(x, [weight], [bias], out.view(-1, len(weight)), False, IN_PARTS, SPLITS)
    return out


def is_skinny(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return all(skinny.fits(x, weight) for weight in weights)
