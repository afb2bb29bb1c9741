"""First hitting (Zheng et al., 2409.02908): the ancestral sampler in continuous time, one position per pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mdkern.decoders.base import Canvas, Planned
from mdkern.decoders.draws import masked_blocks, planned, ranks, uniforms
from mdkern.plan import GIVEN, RevealPlan


@dataclass(frozen=True)
class FirstHitting(Planned, name="first_hitting"):
    """With n masked positions left, ``t <- t u^(1/n)`` for a uniform u, and one of them, chosen uniformly, is revealed.

    These times are the order statistics of n independent uniform times, assigned at random. So each position's time can
    be drawn independently, whatever else is in the batch. The step of a pass is the one of T that its time falls into;
    it determines the model under a schedule. Denoisers with time conditioning are given the exact time.
    """

    def plan(self, canvas: Canvas) -> RevealPlan:
        """Draw the hitting times. There is one forward pass for each position, whatever the number of steps."""
        elapsed = uniforms(canvas)
        plan = planned(canvas, elapsed)
        order = ranks(masked_blocks(canvas)[0], elapsed)
        time = ((canvas.blocks - 1 - canvas.block) + (1.0 - elapsed)) / canvas.blocks
        return RevealPlan(
            plan.step,
            canvas.steps,
            torch.where(canvas.masked, order, GIVEN),
            torch.where(canvas.masked, time, 0.0).float(),
        )
