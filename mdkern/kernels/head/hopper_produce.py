"""The producer warp of `hopper_projection`: copies tiles of the hidden states and of the weight to shared memory."""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mdkern.kernels.gluon_common import ring_advance
from mdkern.kernels.head.hopper_position import item_position


@gluon.jit
def produce_tiles(
    hidden,
    weight,
    rings,
    work,
    K_TILES: gl.constexpr,
    PROGRAMS: gl.constexpr,
    FIXED: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    STATIONARY: gl.constexpr,
    HEAD_START: gl.constexpr,
):
    """The producer warp: fill the ring.

    Full rings in all programs are 15 MB of copies in flight, and any other load waits behind them. So after
    `HEAD_START` copies the producer lets the consumers load their first operands.
    """
    hidden_ring, weight_ring, full, empty, asked = rings[:5]
    program, items, schedule = work
    stage = program * 0
    phase = stage + 1
    FLOAT8: gl.constexpr = weight.dtype == gl.float8e4nv
    raw_stage = program * 0
    raw_phase = raw_stage + 1
    for item in range(items):
        row_tile, first, last, stride, _ = item_position(item, program, schedule, PROGRAMS, FIXED)
        for tile in range(first, last, stride):
            for k in range(K_TILES):
                if HEAD_START > 0:
                    mbarrier.wait(asked, 0, pred=k >= HEAD_START)
                if FLOAT8:  # it goes to the converter's ring
                    raw_ring, raw_full, raw_empty = rings[5:]
                    mbarrier.wait(raw_empty.index(raw_stage), raw_phase)
                    ready = raw_full.index(raw_stage)
                    mbarrier.expect(ready, BN * BK)
                    tma.async_copy_global_to_shared(weight, [tile * BN, k * BK], ready, raw_ring.index(raw_stage))
                    raw_stage, raw_phase = ring_advance(raw_stage, raw_phase, raw_ring.shape[0])
                    if not STATIONARY:
                        mbarrier.wait(empty.index(stage), phase)
                        ready = full.index(stage)
                        mbarrier.expect(ready, BM * BK * 2)
                else:
                    mbarrier.wait(empty.index(stage), phase)
                    ready = full.index(stage)
                    mbarrier.expect(ready, (BN if STATIONARY else BM + BN) * BK * 2)
                    tma.async_copy_global_to_shared(weight, [tile * BN, k * BK], ready, weight_ring.index(stage))
                if not STATIONARY:
                    tma.async_copy_global_to_shared(hidden, [row_tile * BM, k * BK], ready, hidden_ring.index(stage))
                stage, phase = ring_advance(stage, phase, STAGES)
