"""Launches `hopper_projection`: chooses its tiles and makes descriptors for the bulk-copy engine (TMA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels.head import hopper_projection
from mdkern.kernels.head.arguments import Head, Rows
from mdkern.kernels.head.launch_skinny import (
    ELEMENT,
    SHARED,
    WEIGHT_ELEMENT,
    SkinnyTiling,
    choose_skinny_tiling,
    project_skinny,
)

__all__ = ["ELEMENT", "HopperTiling", "SkinnyTiling", "choose_hopper_tiling", "project_on_hopper", "project_skinny"]

HIDDEN_DIM = 64  # elements of a copied tile's rows: 128 bytes, the width of the shared-memory swizzle
HEAD_START = 2  # copies that the producer starts before the consumers load their rows
CONSUMER_REGISTERS = 224  # registers of a thread of each consumer; the producer has 24
# With converters: 168 + 168 + 56 + 56 + 24 are nearly the registers that five warpgroups have at 96 each.
FLOAT8_REGISTERS, CONVERTER_REGISTERS = 168, 56


@dataclass(frozen=True)
class HopperTiling:
    """How `hopper_projection` divides its work, with 64 rows for each consumer warpgroup."""

    programs_per_sm: ClassVar[int] = 1

    consumers: int
    vocab: int
    stages: int
    # The rows stay in shared memory and need not be gathered first, so the kernel may be launched before the previous
    # one has ended.
    stationary: bool = False

    raw_stages: int = 0  # of a weight in float8, which two sets of converter warps take in turn; a multiple of 2

    @property
    def float8(self) -> bool:
        """Whether it is for a weight in float8."""
        return self.raw_stages > 0

    @property
    def rows(self) -> int:
        return 64 * self.consumers

    @property
    def gather(self) -> bool:
        """Whether the rows are first copied to one matrix."""
        return not self.stationary

    @property
    def registers(self) -> int:
        """Registers of a thread at launch. Some are left, so that the reduce kernel can start before this one ends."""
        if self.float8:
            return 112 if self.consumers == 1 else 96
        return 128 if self.consumers == 1 else 160


def choose_hopper_tiling(rows: int, hidden: Tensor, float8: bool = False) -> HopperTiling | SkinnyTiling | None:
    """Tiles for at most `rows` rows; None if `triton_projection` should be used. Times: docs/notes/output-layer.md."""
    hidden_dim, size = hidden.shape[1], hidden.element_size()
    if hidden.dtype not in ELEMENT or hidden_dim % 8:  # bulk copies want rows of a multiple of 16 bytes
        return None
    skinny = choose_skinny_tiling(rows, hidden, 1 if float8 else 2)
    if skinny is not None:
        return skinny
    if float8:
        return choose_float8_tiling(rows, hidden)
    stages = (SHARED - triton.cdiv(hidden_dim, HIDDEN_DIM) * 64 * HIDDEN_DIM * size) // (128 * HIDDEN_DIM * size)
    shallow = stages >= 5  # 64 rows fit into shared memory beside a ring
    aligned = hidden_dim % 16 == 0 and hidden.stride(0) % 16 == 0 and hidden.data_ptr() % 16 == 0
    if rows <= 256 and shallow and aligned:
        return HopperTiling(1, 128, min(stages, 7), stationary=True)
    if rows <= (64 if shallow else 128):
        return HopperTiling(1, 128, stages=8)
    if rows <= 1024 and shallow:
        return HopperTiling(2, 128, stages=6)
    return HopperTiling(2, 256, stages=4)


def choose_float8_tiling(rows: int, hidden: Tensor) -> HopperTiling:
    """Tiles for at most `rows` rows and a weight in float8. The ring of 64 KiB that it is copied to hides the latency
    of memory, so the one in 16 bits may be short. Five warpgroups have too few registers for tiles of 256 ids."""
    hidden_dim, raw_stages = hidden.shape[1], 8
    held = triton.cdiv(hidden_dim, HIDDEN_DIM) * 64 * HIDDEN_DIM * 2
    stages = (SHARED - held - raw_stages * 128 * HIDDEN_DIM) // (2 * 128 * HIDDEN_DIM)
    aligned = hidden_dim % 16 == 0 and hidden.stride(0) % 16 == 0 and hidden.data_ptr() % 16 == 0
    if rows <= 256 and stages >= 4 and aligned:
        return HopperTiling(1, 128, min(stages, 6), stationary=True, raw_stages=raw_stages)
    if rows <= 64:
        return HopperTiling(1, 128, stages=6, raw_stages=raw_stages)
    return HopperTiling(2, 128, stages=5, raw_stages=raw_stages)


def project_on_hopper(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    partial_results: tuple[Tensor, Tensor],
    tiling: HopperTiling,
    constants: dict[str, Any],
    first: int | None,
) -> None:
    """Run the first kernel: statistics and leading groups of each part of the vocabulary."""

    def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, WEIGHT_ELEMENT[matrix.dtype])
        return TensorDescriptor.from_tensor(matrix, block, layout)

    assert head.weight is not None
    if head.weight_scale is not None and not tiling.float8:
        raise ValueError("a weight in float8 needs a HopperTiling with raw_stages")
    source: Any = hidden
    if tiling.gather:
        source = descriptor(gather_rows(hidden, rows.row_index, tiling.rows), [tiling.rows, HIDDEN_DIM])
    hopper_projection.vocab_projection_hopper_kernel[(constants["PROGRAMS"],)](
        source,
        descriptor(head.weight, [tiling.vocab, HIDDEN_DIM]),
        head.weight_scale,
        head.bias,
        *rows,
        *partial_results,
        rows.row_index.shape[0],
        head.vocab(hidden),
        *hidden.shape,
        hidden.stride(0),
        head.scale,
        head.soft_cap,
        first,
        HAS_SCALE=head.scale != 1.0,
        HAS_CAP=head.soft_cap > 0.0,
        num_warps=4,
        maxnreg=tiling.registers,
        launch_pdl=tiling.stationary,
        **tiling_constants(tiling, hidden.shape[1]),
        **constants,
    )


def gather_rows(hidden: Tensor, row_index: Tensor, tile: int) -> Tensor:
    """Copy the rows to a matrix of whole tiles, so that no bulk copy reads past its end. Added rows are not used."""
    count = row_index.shape[0]
    gathered = hidden.new_empty((triton.cdiv(count, tile) * tile, hidden.shape[1]))
    torch.index_select(hidden, 0, row_index, out=gathered[:count])
    return gathered


def tiling_constants(tiling: HopperTiling, hidden_dim: int) -> dict[str, Any]:
    """The constants that depend on the tiling."""
    return {
        "K_TILES": triton.cdiv(hidden_dim, HIDDEN_DIM),
        "CONSUMERS": tiling.consumers,
        "BN": tiling.vocab,
        "BK": HIDDEN_DIM,
        "STAGES": tiling.stages,
        "STATIONARY": tiling.stationary,
        "HEAD_START": HEAD_START,
        "REGISTERS": FLOAT8_REGISTERS if tiling.float8 else CONSUMER_REGISTERS,
        "RAW_STAGES": tiling.raw_stages,
        "CONVERTER_REGISTERS": CONVERTER_REGISTERS,
    }
