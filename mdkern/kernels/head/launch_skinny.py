"""Launches `hopper_skinny`, a program on each multiprocessor, and `hopper_skinny_reduce`, a warp for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mdkern.kernels.head import hopper_skinny, hopper_skinny_noise, hopper_skinny_reduce
from mdkern.kernels.head.arguments import Head, Rows

GROUP_SIZE = hopper_skinny.GROUP_SIZE.value
RECORD = hopper_skinny_reduce.RECORD.value
SHARED = 227 * 1024 - 3072  # bytes of shared memory for tiles; the rest is for barriers and exchange between lanes
RING = 128 * 1024  # bytes in flight; more is slower, see docs/notes/output-layer.md
ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}  # of the rows
WEIGHT_ELEMENT = ELEMENT | {torch.float8_e4m3fn: gl.float8e4nv}


@dataclass(frozen=True)
class SkinnyTiling:
    """How `hopper_skinny` divides its work: groups of 64 ids by `rows` rows, all of which stay in shared memory."""

    programs_per_sm: ClassVar[int] = 1
    gather: ClassVar[bool] = False
    vocab: ClassVar[int] = GROUP_SIZE

    rows: int
    stages: int  # of the ring, each with a tile for each consumer
    hidden_dim: int  # columns of a copied tile
    consumers: int = 1  # warpgroups that multiply and fold, in turn: 2 for a weight in float8, which takes them longer

    @property
    def registers(self) -> int:
        """Registers of a thread at launch. Some are left, so that the reduce kernel can start before this one ends."""
        return 128 if self.consumers == 1 else 112

    @property
    def head_start(self) -> int:
        """Number of copies that start before the consumers load their rows: 32 KiB in all in 16 bits."""
        return 256 // self.hidden_dim


def choose_skinny_tiling(rows: int, hidden: Tensor, weight_bytes: int = 2) -> SkinnyTiling | None:
    """Tiles for at most `rows` rows. None above 16 rows, where `hopper_projection` is faster, and if the rows and four
    copied tiles do not fit into shared memory."""
    hidden_dim, aligned = hidden.shape[1], hidden.stride(0) % 16 == 0 and hidden.data_ptr() % 16 == 0
    if rows > 16 or hidden.dtype not in ELEMENT or hidden_dim % 16 or not aligned:
        return None
    held, float8 = 8 if rows <= 8 else 16, weight_bytes == 1
    for copied in (128,) if float8 else (256, 128):  # converted, a tile of 256 takes too many registers
        tile = GROUP_SIZE * copied * (2 if float8 else weight_bytes)  # two consumers have a tile each
        stages = min(RING, SHARED - held_bytes(held, copied, hidden_dim)) // tile
        if stages >= 4 and (hidden_dim % copied == 0 or copied == 128):
            return SkinnyTiling(held, stages, copied, consumers=2 if float8 else 1)
    return None


def held_bytes(rows: int, copied: int, hidden_dim: int) -> int:
    """Bytes of shared memory besides the ring: the rows, and the noise of two groups."""
    noise = hopper_skinny_noise.NOISE_STAGES.value * (GROUP_SIZE + 1) * rows * 4
    return triton.cdiv(hidden_dim, copied) * copied * rows * 2 + noise


def project_skinny(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    tiling: SkinnyTiling,
    constants: dict[str, Any],
    results: tuple[Tensor | None, ...],
    first: int | None,
) -> None:
    """Run both kernels. `results`: the outputs and the shard's records, of which either is None."""
    assert head.weight is not None
    capacity, vocab = rows.row_index.shape[0], head.vocab(hidden)
    programs = min(constants["PROGRAMS"], triton.cdiv(vocab, GROUP_SIZE))
    constants = {name: value for name, value in constants.items() if name != "FIXED"}
    parts = programs * tiling.consumers
    records = torch.empty((capacity, parts, RECORD), dtype=torch.float32, device=hidden.device)
    block = [GROUP_SIZE, tiling.hidden_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, WEIGHT_ELEMENT[head.weight.dtype])
    hopper_skinny.vocab_projection_skinny_kernel[(programs,)](
        hidden,
        TensorDescriptor.from_tensor(head.weight, block, layout),
        head.weight_scale,
        head.bias,
        *rows,
        records,
        capacity,
        vocab,
        *hidden.shape,
        hidden.stride(0),
        head.scale,
        head.soft_cap,
        first,
        PROGRAMS=programs,
        MODE=constants["MODE"],
        WANT_ARGMAX=constants["WANT_ARGMAX"],
        OF_SAMPLER=constants["OF_SAMPLER"],
        HAS_SCALE=head.scale != 1.0,
        HAS_CAP=head.soft_cap > 0.0,
        num_warps=4,
        maxnreg=tiling.registers,
        launch_pdl=True,
        **tiling_constants(tiling, hidden.shape[1]),
    )
    token, log_prob, top1, top2, entropy, logsumexp, argmax, shard_records = results
    hopper_skinny_reduce.vocab_projection_skinny_reduce_kernel[(capacity,)](
        records,
        rows.row_count,
        rows.temperature,
        rows.uniform_temperature,
        token,
        log_prob,
        logsumexp,
        top1,
        top2,
        entropy,
        argmax,
        shard_records,
        capacity,
        SPLITS=max(32, triton.next_power_of_2(parts)),
        num_warps=1 if parts <= 256 else 2,
        launch_pdl=True,
        **constants | {"PROGRAMS": parts},
    )


def tiling_constants(tiling: SkinnyTiling, hidden_dim: int) -> dict[str, Any]:
    """The constants that depend on the tiling."""
    return {
        "K_TILES": triton.cdiv(hidden_dim, tiling.hidden_dim),
        "ROWS": tiling.rows,
        "BK": tiling.hidden_dim,
        "STAGES": tiling.stages,
        "HEAD_START": tiling.head_start,
        "CONSUMERS": tiling.consumers,
    }
