"""LLaDA's random remasking (Nie et al., 2502.09992): a fixed number of positions per step, in uniform order."""

from __future__ import annotations

from dataclasses import dataclass

from mdkern.decoders.base import Canvas, Planned
from mdkern.decoders.draws import masked_blocks, ranks, steps_of_run, uniforms
from mdkern.plan import RevealPlan


@dataclass(frozen=True)
class RandomRemask(Planned, name="random"):
    """A block's n masks in S steps: ``n // S`` at each step, one more at each of the first ``n % S``, in uniform order.

    LLaDA draws a random confidence for each position anew at every step, which chooses a uniform subset of the masks
    that are left. The result is a uniform order, which is drawn here once.
    """

    def plan(self, canvas: Canvas) -> RevealPlan:
        """Draw the order and divide it among the steps."""
        block, before, size = masked_blocks(canvas)
        rank = ranks(block, uniforms(canvas)) - before
        block_steps = canvas.block_steps
        share, extra = size // block_steps, size % block_steps
        in_larger = extra * (share + 1)  # number of masks revealed in the steps that reveal one more
        step = (rank // (share + 1)).where(rank < in_larger, extra + (rank - in_larger) // share.clamp(min=1))
        return RevealPlan(steps_of_run(canvas, step), canvas.steps)
