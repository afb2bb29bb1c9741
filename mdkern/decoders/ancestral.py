"""Ancestral decoding of MD4 (Shi et al., 2406.04329) and MDLM (Sahoo et al., 2406.07524)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders.base import Canvas, Planned
from mdkern.decoders.checks import check_choice, check_number
from mdkern.decoders.draws import by_block_steps, steps_of_run
from mdkern.plan import RevealPlan


def linear(times: Tensor) -> Tensor:
    """``alpha_t = 1 - t``: every step reveals the same share of the text. MDLM's log-linear noise."""
    return 1.0 - times


def cosine(times: Tensor) -> Tensor:
    """``alpha_t = 1 - cos(pi / 2 (1 - t))``: few reveals at first, many at the end. MD4."""
    return 1.0 - torch.cos((1.0 - times) * (math.pi / 2))


def cosine_grid(times: Tensor) -> Tensor:
    """``t = cos(pi / 2 (1 - u))`` of times u on a linear grid: few reveals at first, many at the end. MD4's code."""
    return torch.cos((1.0 - times) * (math.pi / 2))


ALPHAS = {"linear": linear, "cosine": cosine}
GRIDS: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda times: times, "cosine": cosine_grid}


@dataclass(frozen=True)
class Ancestral(Planned, name="ancestral"):
    """At a step t -> s each masked position is revealed with probability ``(alpha_s - alpha_t) / (1 - alpha_t)``.

    t goes from 1 to `eps` (on the cosine grid, to its image). Positions that are still masked after the last step take
    the most probable token in a closing pass. With blocks, t goes from 1 to `eps` over the steps of each block, and the
    last step of a block reveals everything that is left of it.

    Args:
        eps: the last t on a linear grid, in [0, 1).
        alpha: probability that a position is revealed by time t: ``"linear"``, ``"cosine"`` or a function of float64
            times, at most 1, that rises as t falls and is below 1 at t = 1. It is kept as the function. A denoiser with
            time conditioning is given t, so use the alpha that it was trained with.
        closing_pass: False: the last step reveals everything that is left, with or without blocks, and there is no
            closing pass. This is Dream's ``origin``.
        grid: the times of the steps: ``"linear"``, or ``"cosine"`` for ``cos(pi / 2 (1 - t))`` of the linear ones, as
            in MD4's code. With alpha ``"linear"`` this reveals as many positions at each step as alpha ``"cosine"`` on
            a linear grid does, but a denoiser with time conditioning is given other times.
    """

    eps: float = 1e-5
    alpha: Any = "linear"  # may be given as a name, and becomes a function of times
    grid: str = "linear"
    closing_pass: bool = True

    def __post_init__(self) -> None:
        check_number(self, "eps", 0.0, 1.0, below=True)
        check_choice("grid", self.grid, GRIDS)
        if not isinstance(self.closing_pass, bool):
            raise ValueError(f"closing_pass must be true or false, not {self.closing_pass!r}")
        if not callable(self.alpha):
            check_choice("alpha", self.alpha, ALPHAS)
            object.__setattr__(self, "alpha", ALPHAS[self.alpha])
            return
        values = torch.as_tensor(self.alpha(self.times(1000)))
        if values.shape != (1001,) or not values.is_floating_point():
            raise ValueError(
                f"alpha must give a floating tensor of its argument's shape, not {values.dtype} {tuple(values.shape)}"
            )
        if not (bool((values.diff() >= 0).all()) and 0 <= float(values[0]) < 1 and float(values[-1]) <= 1):
            raise ValueError("alpha must rise as t falls from 1, from a value in [0, 1) to one of at most 1")

    def times(self, steps: int) -> Tensor:
        """float64 ``[steps + 1]``: t before each step, and at the closing pass."""
        return GRIDS[self.grid](torch.linspace(1.0, self.eps, steps + 1, dtype=torch.float64))

    def plan(self, canvas: Canvas) -> RevealPlan:
        """Draw the chain's reveal steps by inversion: a position that is masked at t = 1 is still masked at t with
        probability ``(1 - alpha_t) / (1 - alpha_1)``.
        """
        step = by_block_steps(canvas, self.block_step)
        closes = (canvas.blocks == 1) & self.closing_pass
        return RevealPlan(torch.where(closes, step, steps_of_run(canvas, step)), canvas.steps)

    def block_step(self, canvas: Canvas, steps: int) -> Tensor:
        """int64 ``[N, L]``: the step of its block at which each position is revealed; `steps` for the closing pass."""
        alpha = self.alpha(self.times(steps)).double()
        revealed = ((alpha - alpha[0]) / (1.0 - alpha[0])).to(canvas.masked.device)
        return RevealPlan.draw(canvas.masked, revealed, canvas.seed, canvas.sample, canvas.position).step
