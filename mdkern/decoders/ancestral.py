"""Ancestral decoding of MD4 (Shi et al., 2406.04329) and MDLM (Sahoo et al., 2406.07524)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ancestral:
    """At a step t -> s each masked position is revealed with probability ``(alpha_s - alpha_t) / (1 - alpha_t)``.

    ``alpha_t = 1 - t`` (log-linear noise), so that the probability is ``(t - s) / t``; t runs linearly from 1 to `eps`.
    What is still masked after the last step takes the argmax in a closing pass. The order of the reveals does not
    depend on the model, so a `RevealPlan` can be drawn beforehand.
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"eps must lie in [0, 1), not {self.eps}")

    def times(self, steps: int) -> Tensor:
        """float64 ``[steps + 1]``: t before each step, and at the closing pass."""
        return torch.linspace(1.0, self.eps, steps + 1, dtype=torch.float64)

    def alpha(self, times: Tensor) -> Tensor:
        """Probability that a position is revealed by time t."""
        return 1.0 - times
