"""Launches `hopper_projection`: chooses its tiles and describes the matrices to the bulk-copy engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels.head import hopper_projection
from mdkern.kernels.head.launch_skinny import ELEMENT, SHARED, FewTiling, choose_few_tiling, project_few

__all__ = ["ELEMENT", "FewTiling", "HopperTiling", "choose_hopper_tiling", "project_few", "project_on_hopper"]

DEPTH = 64  # columns of a copied tile: 128 bytes, the width of the shared-memory swizzle


@dataclass(frozen=True)
class HopperTiling:
    """How `hopper_projection` cuts its work: 64 rows for each multiplying warpgroup."""

    warpgroups: int
    columns: int
    stages: int
    stationary: bool = False  # the rows stay in shared memory, and need not be gathered first
    waits: bool = False  # launched before the kernel before it ends, which it then waits for
    head_start: int = 2  # copies before the multiplying warps have asked for their rows
    per_processor: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def gather(self) -> bool:
        """Whether the rows are copied together first."""
        return not self.stationary

    @property
    def registers(self) -> int:
        """Of a thread at launch. Some are left over, for `_finish` to be in place before this kernel ends: at 64 rows
        both take 38.7 us of an H100, and 44.5 where this kernel takes every register."""
        return 128 if self.warpgroups == 1 else 160

    @property
    def second_registers(self) -> int:
        """Of a thread of the second multiplying warpgroup; the first gets as many, the copying one 24."""
        return 224


def choose_hopper_tiling(rows: int, hidden: Tensor) -> HopperTiling | FewTiling | None:
    """Tiles for at most `rows` rows; None where `triton_projection` is to serve. At most 16: `choose_few_tiling`.

    Medians at D = 768, V = 50,258 with a temperature per row, a bias and all statistics, over the padded cuBLAS product
    alone, on an H100 (in brackets what `triton_projection` takes): 1.14 at 64 rows (1.29), 1.10 at 128 (1.37), 1.16 at
    256 (1.39), 1.23 at 512 (1.35), 1.26 at 1,024 (1.45), 1.25 at 4,096 and 16,384 (1.40, 1.46). At D = 4096,
    V = 126,464, sampled, on an H200: 0.96 at 128 rows (1.09), 1.11 at 256 (1.22), 1.06 at 512 (1.09), 1.05 at 1,024
    (1.08) and 4,096, 1.03 at 16,384. benchmarks/results has all of an H200's.
    """
    depth, size = hidden.shape[1], hidden.element_size()
    if hidden.dtype not in ELEMENT or depth % 8:  # bulk copies want rows of a multiple of 16 bytes
        return None
    few = choose_few_tiling(rows, hidden)
    if few is not None:
        return few
    stages = (SHARED - triton.cdiv(depth, DEPTH) * 64 * DEPTH * size) // (128 * DEPTH * size)
    shallow = stages >= 5  # 64 rows fit beside a ring
    aligned = depth % 16 == 0 and hidden.stride(0) % 16 == 0 and hidden.data_ptr() % 16 == 0
    if rows <= 256 and shallow and aligned:
        return HopperTiling(1, 128, min(stages, 7), stationary=True, waits=True)
    if rows <= (64 if shallow else 128):
        return HopperTiling(1, 128, stages=8)
    if rows <= 1024 and shallow:
        return HopperTiling(2, 128, stages=6)
    return HopperTiling(2, 256, stages=4)


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
    if tiling.gather:
        source = descriptor(gather_rows(hidden, rows[0], tiling.rows), [tiling.rows, DEPTH])
    hopper_projection.vocab_projection_hopper_kernel[(wanted["PROGRAMS"],)](
        source,
        descriptor(weight, [tiling.columns, DEPTH]),
        bias,
        *rows,
        hidden.stride(0),
        scale,
        soft_cap,
        num_warps=4,
        maxnreg=tiling.registers,
        launch_pdl=tiling.waits,
        **constants(tiling, hidden.shape[1]),
        **wanted,
    )


def gather_rows(hidden: Tensor, row_index: Tensor, tile: int) -> Tensor:
    """The rows in a matrix of whole tiles, for no copy to reach over its end: with that D = 4096, V = 126,464 took an
    H200 274 us at 1 row, 256 us at 64. What is behind the rows is not written; nothing is made of it."""
    count = row_index.shape[0]
    gathered = hidden.new_empty((triton.cdiv(count, tile) * tile, hidden.shape[1]))
    torch.index_select(hidden, 0, row_index, out=gathered[:count])
    return gathered


def constants(tiling: HopperTiling, depth: int) -> dict[str, Any]:
    """What the kernel is compiled for, besides what is wanted of it."""
    return {
        "K_TILES": triton.cdiv(depth, DEPTH),
        "CONSUMERS": tiling.warpgroups,
        "BN": tiling.columns,
        "BK": DEPTH,
        "STAGES": tiling.stages,
        "STATIONARY": tiling.stationary,
        "HEAD_START": tiling.head_start,
        "WAIT": tiling.waits,
        "REGISTERS": tiling.second_registers,
    }
