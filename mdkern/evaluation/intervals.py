"""Means with their standard errors, and 95 % confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Estimate", "estimate", "paired", "rank_correlation"]

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean over independent values."""

    mean: float
    standard_error: float  # NaN for one value
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean, by the normal approximation."""
        return self.mean - NORMAL_95 * self.standard_error, self.mean + NORMAL_95 * self.standard_error

    def as_dict(self) -> dict[str, float | int | list[float]]:
        return {
            "mean": self.mean,
            "standard_error": self.standard_error,
            "interval_95": list(self.interval),
            "count": self.count,
        }

    def __neg__(self) -> Estimate:
        return replace(self, mean=-self.mean)

    def __str__(self) -> str:
        error = NORMAL_95 * self.standard_error
        return f"{self.mean:.4f}" if math.isnan(error) else f"{self.mean:.4f} ± {error:.4f}"


def estimate(values: Tensor) -> Estimate:
    """The mean of ``values [n]`` and its standard error."""
    values = values.double().flatten()
    if not len(values):
        raise ValueError("values must not be empty")
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), error, len(values))


def paired(ours: Tensor, theirs: Tensor) -> Estimate:
    """The mean of ``ours - theirs``, ``[n]`` each, pair by pair, so that variation common to a pair cancels out.

    Raises:
        ValueError: shapes that differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"pairs must be as many on both sides, not {tuple(ours.shape)} and {tuple(theirs.shape)}")
    return estimate(ours.double() - theirs.double())


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two tensors ``[n]``; equal values share their mean rank."""
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"two vectors of the same length, at least 2, are needed: {first.shape} and {second.shape}")
    ranks = torch.stack((mean_ranks(first), mean_ranks(second)))
    return float(torch.corrcoef(ranks)[0, 1])


def mean_ranks(values: Tensor) -> Tensor:
    """float64 ``[n]``: 0 for the smallest; equal values share their mean rank."""
    values = values.double()
    below = (values[:, None] > values).sum(-1)
    equal = (values[:, None] == values).sum(-1)
    return below + (equal - 1) / 2
