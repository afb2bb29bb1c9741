"""GenMD4 (Shi et al., 2406.04329, section 6): noise schedules of different shapes, here one per position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdkern.decoders.base import Canvas, Planned
from mdkern.decoders.draws import planned, uniforms
from mdkern.plan import RevealPlan


@dataclass(frozen=True, eq=False)
class GenMD4(Planned, name="genmd4"):
    """``alpha_{t,i} = 1 - t^{w_i}``: a masked position is revealed with ``(t^w - s^w) / t^w`` at a step t -> s.

    In the paper w depends on the token, so that the order depends on the model. Here it depends on the position in the
    text, so that the order can be drawn beforehand. A position with a large w is revealed early.

    Args:
        exponents: w, above 0: one number, or floating ``[L]`` or longer, by position in the text.
    """

    exponents: Tensor | float

    def __post_init__(self) -> None:
        exponents = torch.as_tensor(self.exponents, dtype=torch.float64)
        if exponents.ndim > 1 or exponents.numel() == 0 or not bool((exponents.isfinite() & (exponents > 0)).all()):
            raise ValueError("exponents must be a number above 0, or [L] of them")
        object.__setattr__(self, "exponents", exponents)

    def plan(self, canvas: Canvas) -> RevealPlan:
        """Draw by inversion: t^w is uniform when the position is revealed.

        Raises:
            ValueError: fewer exponents than positions.
        """
        exponents = torch.as_tensor(self.exponents, device=canvas.masked.device)
        if exponents.ndim == 1:
            positions = int(torch.where(canvas.masked, canvas.position, 0).max()) + 1
            if exponents.shape[0] < positions:
                raise ValueError(f"exponents must be at least {positions}, one per position, not {exponents.shape[0]}")
            exponents = exponents[canvas.position.clamp(max=exponents.shape[0] - 1)]
        # 1 - (1 - u)^(1/w), the share of the time that has passed, without cancellation for small u
        return planned(canvas, -torch.expm1(torch.log1p(-uniforms(canvas)) / exponents))
