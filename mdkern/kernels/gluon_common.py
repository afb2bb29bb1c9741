"""Shared by the Gluon kernels of all folders."""

# mypy: ignore-errors
# ruff: noqa: N803

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6 and 3.7


@gluon.jit
def ring_advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and the phase of its barriers there."""
    stage += 1
    if stage == STAGES:
        stage = stage * 0
        phase ^= 1
    return stage, phase
