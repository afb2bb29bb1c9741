"""Launches `hopper_linear`: chooses its tiles and describes the matrices to the bulk-copy engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels.hopper_linear import _linear
from mdkern.kernels.launch_hopper import ELEMENT


@dataclass(frozen=True)
class Cut:
    """How the work is cut."""

    stages: int  # of the ring
    buffers: int  # of each multiplying warpgroup, 64 x 64 each, through which its finished rows leave
    columns: int = 256
    depth: int = 64
    group: int = 16


# Shared memory for two more buffers a warpgroup, or for a fourth stage: that is 0.7 % of a 12-block backbone, but a
# stream's tile has to be in place before its end.
PLAIN = Cut(stages=4, buffers=2)
ADDING = Cut(stages=3, buffers=4)


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    stream: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    length: int = 1,
    turned: int = 0,
    gelu: bool = False,
    sums: Tensor | None = None,
    out_sums: Tensor | None = None,
) -> None:
    """``out = [stream +] [gate *] [gelu] (x @ weight.T + bias)``, the first `turned` columns turned by `cos`, `sin`.

    `sums` are of the rows of `x`, which are divided by their spread; `out_sums` is where those of `out` go.
    """
    cut = PLAIN if stream is None else ADDING
    rows, depth = x.shape
    columns = weight.shape[0]
    element = ELEMENT[x.dtype]

    def describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, block, gl.NVMMASharedLayout.get_default_for(block, element))

    row_tiles, column_tiles = triton.cdiv(rows, 128), triton.cdiv(columns, cut.columns)
    programs = min(processors(x.device), row_tiles * column_tiles)
    sequences = gate.shape[0] if gate is not None and gate.ndim == 2 else 1
    _linear[(programs,)](
        describe(x, [128, cut.depth]),
        describe(weight, [cut.columns, cut.depth]),
        describe(out, [64, 64]),
        None if stream is None else describe(stream, [64, 64]),
        bias,
        gate,
        cos,
        sin,
        sums,
        out_sums,
        row_tiles,
        column_tiles,
        triton.cdiv(depth, cut.depth),
        rows,
        length,
        turned,
        rows // sequences,
        sequences - 1,
        gate.stride(0) if gate is not None and sequences > 1 else 0,
        BN=cut.columns,
        BK=cut.depth,
        STAGES=cut.stages,
        GROUP=cut.group,
        PROGRAMS=programs,
        GELU=gelu,
        PAIRS=0 if cos is None else cos.shape[1],
        SPANS=0 if sums is None else sums.shape[0],
        BUFFERS=cut.buffers,
        REGISTERS=240,
        num_warps=4,
        maxnreg=168,
    )


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
