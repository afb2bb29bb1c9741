"""Launches `hopper_skinny`, a program per multiprocessor, and `hopper_skinny_reduce`, a warp per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels.head import hopper_skinny, hopper_skinny_reduce

GROUP_SIZE = hopper_skinny.GROUP_SIZE.value
RECORD = hopper_skinny_reduce.RECORD.value
SHARED = 227 * 1024 - 3072  # bytes of shared memory for tiles; the rest is for barriers and exchanges between lanes
RING = 128 * 1024  # bytes on their way; with 176 KiB 16 rows take 25.5 us of an H200 at D = 768, with these 24.6
ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class FewTiling:
    """How `hopper_skinny` cuts its work: groups of 64 ids by `rows` rows, all of which stay in shared memory."""

    rows: int
    stages: int
    depth: int  # columns of a copied tile
    columns: int = GROUP_SIZE
    per_processor: int = 1
    gather: bool = False

    @property
    def head_start(self) -> int:
        """Copies, 32 KiB of them, before the multiplying warps have asked for their rows."""
        return 256 // self.depth

    @property
    def registers(self) -> int:
        """Of a thread at launch. Some are left over, so that the reduce kernel can start before this one ends."""
        return 128


def choose_few_tiling(rows: int, hidden: Tensor) -> FewTiling | None:
    """Tiles for at most `rows` rows; None above 16 rows, where `hopper_projection` wins (27.1 us of an H200 at 32 rows
    sampled, against 29.9), and where the rows and four copied tiles do not fit."""
    depth = hidden.shape[1]
    if rows > 16 or hidden.dtype not in ELEMENT or depth % 16 or hidden.stride(0) % 16 or hidden.data_ptr() % 16:
        return None
    held = 8 if rows <= 8 else 16
    for copied in (256, 128):  # 256 columns a copy take 24.3 us where 128 take 24.6, and waste some of an odd depth
        stages = min(RING, SHARED - held_bytes(held, copied, depth)) // (GROUP_SIZE * copied * 2)
        if stages >= 4 and (depth % copied == 0 or copied == 128):
            return FewTiling(held, stages, copied)
    return None


def held_bytes(rows: int, copied: int, depth: int) -> int:
    """Shared memory that is not the ring's: the rows, and the noise of two groups."""
    return (
        triton.cdiv(depth, copied) * copied * rows * 2 + hopper_skinny.NOISE_STAGES.value * (GROUP_SIZE + 1) * rows * 4
    )


def project_few(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: tuple[Any, ...],
    scale: float,
    soft_cap: float,
    tiling: FewTiling,
    options: dict[str, Any],
    outputs: tuple[Tensor, ...],
) -> None:
    """Both kernels: the outputs of `rows`, which are row_index, row_count, temperature(s), seed and keys."""
    capacity, (columns, depth) = rows[0].shape[0], weight.shape
    programs = min(options["PROGRAMS"], triton.cdiv(columns, GROUP_SIZE))
    options = options | {"PROGRAMS": programs}
    records = torch.empty((capacity, programs, RECORD), dtype=torch.float32, device=hidden.device)
    block = [GROUP_SIZE, tiling.depth]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENT[weight.dtype])
    hopper_skinny.vocab_projection_skinny_kernel[(programs,)](
        hidden,
        TensorDescriptor.from_tensor(weight, block, layout),
        bias,
        *rows,
        records,
        capacity,
        columns,
        depth,
        hidden.stride(0),
        scale,
        soft_cap,
        PROGRAMS=programs,
        MODE=options["MODE"],
        HAS_SCALE=scale != 1.0,
        HAS_CAP=soft_cap > 0.0,
        num_warps=4,
        maxnreg=tiling.registers,
        launch_pdl=True,
        **constants(tiling, depth),
    )
    _, row_count, temperature, uniform_temperature, _, _ = rows
    token, log_prob, top1, top2, entropy, logsumexp = outputs
    hopper_skinny_reduce.vocab_projection_skinny_reduce_kernel[(capacity,)](
        records,
        row_count,
        temperature,
        uniform_temperature,
        token,
        log_prob,
        logsumexp,
        top1,
        top2,
        entropy,
        capacity,
        SPLITS=max(32, triton.next_power_of_2(programs)),
        num_warps=1,
        launch_pdl=True,
        **options,
    )


def constants(tiling: FewTiling, depth: int) -> dict[str, Any]:
    """What `hopper_skinny` is compiled for, besides what is wanted of it."""
    return {
        "K_TILES": triton.cdiv(depth, tiling.depth),
        "ROWS": tiling.rows,
        "BK": tiling.depth,
        "STAGES": tiling.stages,
        "HEAD_START": tiling.head_start,
    }
