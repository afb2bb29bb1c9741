"""The best schedule for a budget, from the cost and the harm of each model in each segment.

Harms are assumed to add up over segments. The assignment of least harm within a budget is then a multiple-choice
knapsack problem, which is solved exactly by keeping all assignments that no other beats in both cost and harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from mdkern.schedule import Schedule

__all__ = ["best_schedule"]


def best_schedule(
    harm: Mapping[str, Sequence[float]],
    cost: Mapping[str, float] | Mapping[str, Sequence[float]],
    budget: float,
) -> Schedule:
    """The schedule of equal segments with the least harm that costs at most the share `budget` of the most expensive.

    Args:
        harm: by model, what it adds to the loss in each of S segments, e.g. its measured influence, or its KL from the
            heaviest model, whose own harm may be all zeros.
        cost: by model, the cost of a segment: one number, or one for each segment. FLOPs or seconds; only ratios count.
        budget: in (0, 1], as a share of the cost of running the most expensive model everywhere.

    Returns:
        A schedule of shares. Of equally good ones it is the cheapest, then the one with the fewest segments.

    Raises:
        ValueError: harms and costs of different models or lengths; numbers that are not finite; a budget that even the
            cheapest model exceeds.
    """
    names = [name.upper() for name in harm]
    harms = torch.tensor([list(harm[name]) for name in harm], dtype=torch.float64)
    by_name = {name.upper(): value for name, value in cost.items()}
    if set(by_name) != set(names):
        raise ValueError(f"cost must be of the models {', '.join(names)}, not of {', '.join(by_name)}")
    if harms.ndim != 2 or not harms.shape[1] or not bool(harms.isfinite().all()):
        raise ValueError("harm must have the same number of finite values, at least one, for each model")
    segments = harms.shape[1]
    costs = torch.stack([torch.as_tensor(by_name[name], dtype=torch.float64).expand(segments) for name in names])
    if not bool((costs > 0).all() and costs.isfinite().all()):
        raise ValueError("cost must be positive and finite")
    whole = float(costs.sum(-1).max())
    least = float(costs.amin(0).sum()) / whole
    if not least * (1 - 1e-9) <= budget <= 1.0:
        raise ValueError(f"budget must lie in {least:.4f} (the cheapest models everywhere) to 1, not {budget}")
    chosen = cheapest(harms.T.tolist(), costs.T.tolist(), budget * whole)
    return Schedule.from_shares([(names[model], Fraction(1, segments)) for model in chosen])


def cheapest(harm: list[list[float]], cost: list[list[float]], most: float) -> list[int]:
    """The model of each segment: the least sum of ``harm[s][m]`` with a sum of ``cost[s][m]`` of at most `most`."""
    slack = 1e-9 * most
    rest = [0.0]  # the least cost of the segments from here on
    for row in reversed(cost):
        rest.append(rest[-1] + min(row))
    rest.reverse()
    # Assignments of the segments so far that no other beats: (cost, harm, changes of model, models), ascending in cost.
    frontier: list[tuple[float, float, int, tuple[int, ...]]] = [(0.0, 0.0, 0, ())]
    for segment, (harms, costs) in enumerate(zip(harm, cost)):
        grown = sorted(
            (spent + costs[m], done + harms[m], changes + (len(path) > 0 and path[-1] != m), (*path, m))
            for spent, done, changes, path in frontier
            for m in range(len(costs))
            if spent + costs[m] + rest[segment + 1] <= most + slack
        )
        frontier = []
        for entry in grown:
            # Equal costs and harms summed in another order differ by rounding; only one of the two is kept.
            beaten = frontier and entry[1] >= frontier[-1][1] - 1e-12 * abs(frontier[-1][1])
            if not beaten:
                frontier.append(entry)
    return list(frontier[-1][3])
