"""Launches `hopper_projection`: chooses its tiles and describes the matrices to the bulk-copy engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels import hopper_projection

DEPTH = 64  # columns of a copied tile: 128 bytes, the width of the shared-memory swizzle
SHARED = 227 * 1024 - 2048  # bytes of shared memory for tiles
REGISTERS = 240  # of a thread of the second multiplying warpgroup; the first gets as many
ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class HopperTiling:
    """How `hopper_projection` cuts its work: 64 rows for each multiplying warpgroup."""

    warpgroups: int
    columns: int
    stages: int
    stationary: bool = False  # the rows stay in shared memory, and need not be gathered first
    per_processor: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


def choose_hopper_tiling(rows: int, hidden: Tensor) -> HopperTiling:
    """Tiles for at most `rows` rows."""
    if rows > 64:
        return HopperTiling(2, 256, stages=4)
    held = triton.cdiv(hidden.shape[1], DEPTH) * 64 * DEPTH * hidden.element_size()
    stages = (SHARED - held) // (128 * DEPTH * hidden.element_size())
    aligned = hidden.stride(0) % 16 == 0 and hidden.data_ptr() % 16 == 0
    if stages >= 4 and aligned:
        return HopperTiling(1, 128, min(stages, 7), stationary=True)
    return HopperTiling(1, 128, stages=8)


def project_on_hopper(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: tuple[Any, ...],
    scale: float,
    soft_cap: float,
    tiling: HopperTiling,
    wanted: dict[str, Any],
) -> None:
    """The first kernel: partial results into two of the tensors of `rows`."""

    def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENT[matrix.dtype])
        return TensorDescriptor.from_tensor(matrix, block, layout)

    source: Any = hidden
    if not tiling.stationary:
        source = descriptor(hidden.index_select(0, rows[0]), [tiling.rows, DEPTH])
    hopper_projection._project[(wanted["PROGRAMS"],)](
        source,
        descriptor(weight, [tiling.columns, DEPTH]),
        bias,
        *rows,
        hidden.stride(0),
        scale,
        soft_cap,
        DEPTH_TILES=triton.cdiv(hidden.shape[1], DEPTH),
        CONSUMERS=tiling.warpgroups,
        BN=tiling.columns,
        BK=DEPTH,
        STAGES=tiling.stages,
        STATIONARY=tiling.stationary,
        REGISTERS=REGISTERS,
        num_warps=4,
        **wanted,
    )
