"""Schedules fitted by each measure, on denoisers whose distance is known by construction."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mdkern import Denoiser, DiT, Schedule, adapt
from mdkern.evaluation import optimize
from mdkern.evaluation.optimize import optimize_schedule
from mdkern.evaluation.search import Found, all_schedules

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")
LENGTH, VOCAB = 8, 5
COST = {"H": 3.0, "L": 1.0}


def bent(strength: Callable[[Tensor], Tensor]) -> Denoiser:
    """A denoiser that leans towards id 0 by a function of the share that is masked."""

    def logits(input_ids: Tensor) -> Tensor:
        lean = torch.zeros(*input_ids.shape, VOCAB)
        lean[..., 0] = strength((input_ids == VOCAB).float().mean(-1))[:, None]
        return lean

    return adapt(logits, vocab_size=VOCAB, mask_id=VOCAB)


HEAVY = bent(torch.zeros_like)
IN_THE_MIDDLE = bent(lambda share: 3.0 * ((share > 0.25) & (share <= 0.75)))  # wrong there, and there only
IDS = torch.randint(VOCAB, (200, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by", ["path_kl", "kl", "loss"])
def test_a_model_that_is_wrong_in_the_middle_runs_at_both_ends(by: str) -> None:
    """Half of the steps may be light: the budget is 1/2 + 1/2 · 1/3."""
    text = {} if by == "path_kl" else {"input_ids": IDS}
    found = optimize_schedule(
        HEAVY, IN_THE_MIDDLE, budget=2 / 3, by=by, segments=4, cost=COST, length=LENGTH, steps=64, **text
    )
    assert found == Schedule.from_segments("LHHL")


def test_a_schedule_fits_itself() -> None:
    options = {"segments": 4, "cost": COST, "length": LENGTH, "steps": 64}
    found = Schedule.optimize(HEAVY, IN_THE_MIDDLE, budget=2 / 3, **options)
    assert found == optimize_schedule(HEAVY, IN_THE_MIDDLE, budget=2 / 3, **options)  # type: ignore[arg-type]


def test_influence_is_that_of_the_search() -> None:
    scores = {models: sum(s for s, model in enumerate(models) if model == "L") for models in all_schedules(4, 2)}
    found = [Found(models, torch.full((3,), float(score))) for models, score in scores.items()]
    for light, schedule in enumerate(
        ("HHHH", "LHHH", "LLHH", "LLLH", "LLLL")
    ):  # the whole budget, not half of it light
        budget = 1 - light / 4 * 2 / 3
        fitted = optimize_schedule(HEAVY, HEAVY, budget=budget, by="influence", found=found, cost=COST)
        assert fitted == Schedule.from_segments(schedule)


def test_three_models_take_what_their_harm_and_cost_allow() -> None:
    models = {"H": HEAVY, "M": IN_THE_MIDDLE, "L": bent(lambda share: 3.0 * torch.ones_like(share))}
    found = optimize_schedule(models, budget=2 / 3, segments=4, cost={"H": 3, "M": 1, "L": 1}, length=LENGTH, steps=64)
    assert found == Schedule.from_segments("MHHM")


def test_costs_are_counted_or_timed(make_dit: Callable[..., DiT], monkeypatch: pytest.MonkeyPatch) -> None:
    heavy, light = make_dit(num_blocks=4), make_dit(num_blocks=1)
    found = optimize.costs("flops", {"H": adapt(heavy), "L": adapt(light)}, 16, 2)
    assert found == {"H": heavy.flops(16, 1), "L": light.flops(16, 1)}
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    assert optimize.costs("time", {"H": adapt(heavy)}, 16, 2) == {"H": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "luck"}, "by must be one of"),
        ({"by": "kl"}, "needs input_ids"),
        ({"by": "path_kl", "input_ids": IDS}, "does not read input_ids"),
        ({"by": "influence"}, "needs found"),
        ({"cost": "flops", "length": LENGTH, "steps": 8}, "does not tell its FLOPs"),
        ({"cost": "money", "length": LENGTH, "steps": 8}, "cost must be"),
        ({"budget": 0.2, "length": LENGTH, "steps": 8}, "budget must lie"),
        ({"by": "influence", "found": [Found(("H", "L"), torch.zeros(2))]}, "leave segments out"),
    ],
)
def test_what_cannot_be_right_is_refused(
    changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured."""
    for name in ("importance", "path_importance"):
        monkeypatch.setattr(optimize, name, lambda *_, **__: pytest.fail("harm was measured"))
    arguments: dict[str, object] = {"budget": 0.8, "segments": 2, "cost": COST} | changes
    with pytest.raises(ValueError, match=message):
        optimize_schedule(HEAVY, IN_THE_MIDDLE, **arguments)  # type: ignore[arg-type]
