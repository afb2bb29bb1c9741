"""The schedule that harms least within a budget: held against trying all of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from mdkern import Schedule
from mdkern.evaluation.assignment import best_schedule, cheapest


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("models", [2, 3])
def test_no_other_assignment_harms_less(seed: int, models: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    harm = torch.randn(6, models, generator=generator, dtype=torch.float64)
    cost = torch.rand(6, models, generator=generator, dtype=torch.float64) + 0.1
    most = float(cost.amin(1).sum()) + 0.4 * float((cost.amax(1) - cost.amin(1)).sum())
    best = min(
        sum(float(harm[s, m]) for s, m in enumerate(choice))
        for choice in itertools.product(range(models), repeat=6)
        if sum(float(cost[s, m]) for s, m in enumerate(choice)) <= most
    )
    chosen = cheapest(harm.tolist(), cost.tolist(), most)
    assert sum(float(cost[s, m]) for s, m in enumerate(chosen)) <= most * (1 + 1e-8)
    assert sum(float(harm[s, m]) for s, m in enumerate(chosen)) == pytest.approx(best)


def test_two_models_of_equal_segments_take_the_light_one_where_it_harms_least() -> None:
    """Four of ten segments may be light: 12 blocks and 4 cost 1 - .4 * 8 / 12 of the whole."""
    light = [0.2, 0.3, 0.9, 1.0, 1.1, 1.2, 0.8, 0.7, 0.6, 0.1]
    found = best_schedule({"H": [0.0] * 10, "L": light}, {"h": 12, "l": 4}, 1 - 0.4 * 8 / 12)
    assert found == Schedule.from_segments("LLHHHHHHLL")


def test_a_harm_below_zero_is_taken_although_nothing_must_be_saved() -> None:
    assert best_schedule({"H": [0, 0, 0], "L": [1, -1, 1]}, {"H": 3, "L": 1}, 1.0) == Schedule.from_segments("HLH")


def test_many_equal_segments_are_quick_and_exact() -> None:
    """A hundred segments and three models of whole costs: the frontier stays small."""
    harm = [[0.0, 1.0 + (s % 7) / 7, 3.0 + (s % 11) / 11] for s in range(100)]
    chosen = cheapest(harm, [[12.0, 8.0, 4.0]] * 100, 100 * 9.0)
    assert sum((12, 8, 4)[m] for m in chosen) <= 900


@pytest.mark.parametrize(
    ("harm", "cost", "budget", "message"),
    [
        ({"H": [0.0], "L": [1.0]}, {"H": 1.0}, 1.0, "of the models"),
        ({"H": [0.0], "L": [1.0, 2.0]}, {"H": 1.0, "L": 1.0}, 1.0, "harm|expected sequence"),
        ({"H": [0.0], "L": [float("nan")]}, {"H": 2.0, "L": 1.0}, 1.0, "finite"),
        ({"H": [0.0], "L": [1.0]}, {"H": 2.0, "L": 0.0}, 1.0, "positive"),
        ({"H": [0.0], "L": [1.0]}, {"H": 2.0, "L": 1.0}, 0.4, "0.5000"),
        ({"H": [0.0], "L": [1.0]}, {"H": 2.0, "L": 1.0}, 1.5, "budget"),
    ],
)
def test_what_cannot_be_right_is_refused(
    harm: dict[str, list[float]], cost: dict[str, float], budget: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        best_schedule(harm, cost, budget)
