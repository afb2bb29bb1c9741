"""Tokens a pass at equal accuracy: what docs/learning.md concludes from the curves of accuracy over speed.

Of several seeds, an estimate is a mean with its standard error over seeds. Of one seed, the error is that of its
problems alone: each point of each curve is redrawn from a normal distribution with the point's standard error, and the
estimate made anew. Points are redrawn independently. All are of the same problems, which makes differences between
them smaller than that; what another seed would give is not in it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

REFERENCE = "base", "threshold", 0.95  # whose strict accuracy others are held to, less the margin
MARGIN = 0.01
REDRAWS = 200
Curve = Sequence[Mapping[str, Any]]
Cell = tuple[str, Sequence[str]]  # a model, and ways of decoding of which the best is taken
Seed = Mapping[str, Any]  # what a seed has found, by part


class Mean(NamedTuple):
    """A mean over seeds, and its standard error: over seeds, or of one seed over its problems (NaN: not known)."""

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        return f"{self.mean:.{digits}f}" + ("" if math.isnan(self.error) else f" ± {self.error:.{digits}f}")


def mean_of(values: Sequence[float]) -> Mean:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), error, len(values))


def over_seeds(estimates: Sequence[Mapping[str, Any]], scale: float = 1.0) -> Mean:
    """The mean of each seed's estimate."""
    found = mean_of([scale * estimate["mean"] for estimate in estimates])
    return found._replace(error=scale * estimates[0]["standard_error"]) if len(estimates) == 1 else found


def target(seed: Seed, margin: float = MARGIN) -> float:
    """The strict accuracy that a way of decoding is held to."""
    model, decoder, threshold = REFERENCE
    points = seed[f"eval_{model}"]["curves"][decoder]
    careful = min(points, key=lambda point: abs(point["threshold"] - threshold))
    return float(careful["strict"]["mean"]) - margin


def most_tokens(curve: Curve, least: float, count: str) -> float:
    """The most tokens a pass at a strict accuracy of at least `least`; NaN if the curve is below it throughout.

    Between two neighbouring thresholds of which one is good enough, accuracy and speed are interpolated linearly.
    """
    points = [(point["strict"]["mean"], point[count]["mean"]) for point in curve]
    found = [speed for right, speed in points if right >= least]
    for (right, speed), (other, faster) in pairwise(points):
        if (right >= least) != (other >= least):
            found.append(speed + (faster - speed) * (right - least) / (right - other))
    return max(found, default=math.nan)


def best(seed: Seed, cell: Cell, count: str, margin: float = MARGIN) -> float:
    """The most tokens a pass of a model with the best of some ways of decoding, at the accuracy that is asked for."""
    model, decoders = cell
    curves = seed[f"eval_{model}"]["curves"]
    values = [most_tokens(curves[decoder], target(seed, margin), count) for decoder in decoders]
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def ratio_of(seed: Seed, above: Cell, below: Cell, count: str, margin: float = MARGIN) -> float:
    """One seed's ratio; NaN if one of the two does not reach the accuracy, or writes nothing."""
    ours, theirs = best(seed, above, count, margin), best(seed, below, count, margin)
    return ours / theirs if ours > 0 and theirs > 0 else math.nan


def redrawn(seed: Seed, cells: Sequence[Cell], count: str, generator: np.random.Generator) -> dict[str, Any]:
    """What `best` reads of these cells, as other problems might have given it."""
    found: dict[str, Any] = {}
    for model, decoders in ((REFERENCE[0], REFERENCE[1:2]), *cells):
        curves = found.setdefault(f"eval_{model}", {"curves": {}})["curves"]
        for decoder in decoders:
            points = seed[f"eval_{model}"]["curves"][decoder]
            means, errors = (
                np.array([[point[key][what] for key in ("strict", count)] for point in points])
                for what in ("mean", "standard_error")
            )
            curves[decoder] = [
                {"threshold": point["threshold"], "strict": {"mean": right}, count: {"mean": speed}}
                for point, (right, speed) in zip(points, generator.normal(means, errors).tolist(), strict=True)
            ]
    return found


def estimated(seeds: Sequence[Seed], cells: Sequence[Cell], count: str, value: Callable[[Seed], float]) -> Mean:
    """The mean over seeds of what `best` says of `cells`; seeds for which it is NaN are left out."""
    known = [found for found in map(value, seeds) if not math.isnan(found)]
    if not known:
        return Mean(math.nan, math.nan, 0)
    if len(seeds) > 1:
        return mean_of(known)
    generator = np.random.default_rng(0)
    anew = [value(redrawn(seeds[0], cells, count, generator)) for _ in range(REDRAWS)]
    reached = [number for number in anew if not math.isnan(number)]
    return Mean(known[0], statistics.stdev(reached) if len(reached) > 1 else math.nan, 1)


def speed(seeds: Sequence[Seed], cell: Cell, count: str, margin: float = MARGIN) -> Mean:
    """The most tokens a pass of a cell; `seeds` of those that reach the accuracy."""
    return estimated(seeds, [cell], count, lambda seed: best(seed, cell, count, margin))


def ratio(seeds: Sequence[Seed], above: Cell, below: Cell, count: str, margin: float = MARGIN) -> Mean | None:
    """How many times as many tokens a pass one (model, ways of decoding) has as another, by seed.

    None if one of them does not reach the accuracy for some seed.
    """
    found = estimated(seeds, [above, below], count, lambda seed: ratio_of(seed, above, below, count, margin))
    return found if seeds and found.seeds == len(seeds) else None
