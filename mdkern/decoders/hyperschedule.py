"""Hyperschedules (Fathi et al., 2504.06416): a noise level of its own for each position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders.base import Canvas, Planned
from mdkern.decoders.checks import check_choice, check_whole
from mdkern.decoders.draws import by_block_steps, masked_blocks, ranks, steps_of_run, uniforms
from mdkern.plan import RevealPlan

Level = Callable[[Tensor, Tensor, Tensor], Tensor]
SLACK = 1e-9  # tolerance for rounding when a user's level is checked


def flat(time: Tensor, position: Tensor, length: Tensor) -> Tensor:
    """All positions at the level t: plain diffusion."""
    return time.expand(position.shape)


def block(time: Tensor, position: Tensor, length: Tensor, width: int) -> Tensor:
    """Block after block of `width` positions falls from 1 to 0, each in an equal share of the time."""
    blocks = (length + width - 1) // width
    return (position // width + 1 - (1.0 - time) * blocks).clamp(0.0, 1.0)


def sliding(time: Tensor, position: Tensor, length: Tensor, width: int) -> Tensor:
    """A window of `width` positions moves over the text at an even pace; the level falls linearly across it."""
    return ((position + width - (1.0 - time) * (length + width - 1)) / width).clamp(0.0, 1.0)


WITH_WIDTH = {"block": block, "sliding": sliding}
KINDS: dict[str, Level] = {"flat": flat, "quenched": partial(sliding, width=1)}


@dataclass(frozen=True)
class Hyperschedule(Planned, name="hyperschedule"):
    """Position i is masked at time t with probability ``tau_i(t)``, its noise level, which falls from 1 to 0.

    At a step t -> s a masked position is revealed with probability ``(tau_i(t) - tau_i(s)) / tau_i(t)``, so only while
    its level falls. Positions are counted over the masks of a block, which is the whole text if there are no blocks.

    Args:
        kind: ``"flat"``: all levels are t. ``"quenched"``: one position after the other, autoregressive. ``"block"``:
            one block of `width` after the other. ``"sliding"``: a window of `width` positions, whose levels fall
            linearly, moves over the text. Or a function ``level(t, position, length)``: t a float64 scalar tensor,
            position and length int64 ``[N, L]``, the level float64 ``[N, L]``.
        width: positions of a block or window.
    """

    kind: str | Level = "flat"
    width: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.kind):
            check_choice("kind", self.kind, [*KINDS, *WITH_WIDTH])
        needs = self.kind in WITH_WIDTH if isinstance(self.kind, str) else False
        if needs != (self.width is not None):
            raise ValueError(f"width goes with kind {' or '.join(map(repr, WITH_WIDTH))}, and only with it")
        if needs:
            check_whole(self, "width", 1)

    @property
    def level(self) -> Level:
        """The noise level as a function."""
        if not isinstance(self.kind, str):
            return self.kind
        chosen: Any = WITH_WIDTH.get(self.kind)
        return KINDS[self.kind] if chosen is None else partial(chosen, width=self.width)

    def plan(self, canvas: Canvas) -> RevealPlan:
        """Draw by inversion: a position is revealed at the first step that ends with its level below 1 - u.

        Raises:
            ValueError: a user's level that is not 1 at t = 1 and 0 at t = 0, or rises as t falls.
        """
        return RevealPlan(steps_of_run(canvas, by_block_steps(canvas, self.block_step)), canvas.steps)

    def block_step(self, canvas: Canvas, steps: int) -> Tensor:
        """int64 ``[N, L]``: the step of its block at which each position is revealed."""
        number, before, length = masked_blocks(canvas)
        zeros = torch.zeros_like(number)
        position = torch.where(canvas.masked, ranks(number, zeros) - before, 0)
        remainder = 1.0 - uniforms(canvas)
        times = self.times(steps).to(remainder.device)
        last = self.level(times[0], position, length).double().expand_as(remainder)
        wrong = last < 1.0 - SLACK
        step = zeros
        for time in times[1:]:
            level = self.level(time, position, length).double()
            wrong = wrong | ~(level <= last + SLACK)  # written so that NaN is wrong, too
            step, last = step + (level >= remainder), level
        wrong = wrong | (last > SLACK)
        if bool((wrong & canvas.masked).any()):
            raise ValueError("level must fall from 1 at t = 1 to 0 at t = 0 at every position, and never rise")
        return step
