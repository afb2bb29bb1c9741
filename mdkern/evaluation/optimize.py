"""Fits a schedule to models and a budget, without a search over schedules.

The harm of a model in each segment of the steps is measured in one of four ways. `best_schedule` then finds the
assignment of models to segments with the least harm within the budget.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mdkern.engine.resolve import check_count
from mdkern.engine.resolve_models import resolve_models
from mdkern.evaluation.assignment import best_schedule
from mdkern.evaluation.importance import importance, path_importance
from mdkern.evaluation.search import Found, influence
from mdkern.models import Denoiser
from mdkern.profiling.profile import timed
from mdkern.schedule import Schedule

__all__ = ["optimize_schedule"]

MEASURES = "path_kl", "kl", "loss", "influence"
COST_PASSES = 5  # passes that are timed, after two to warm up


def optimize_schedule(
    heavy: Any,
    light: Any = None,
    *,
    budget: float,
    by: str = "path_kl",
    segments: int | None = None,
    cost: str | Mapping[str, float] = "flops",
    input_ids: Tensor | None = None,
    found: Sequence[Found] | None = None,
    length: int | None = None,
    num_samples: int = 64,
    steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Schedule:
    """The schedule of equal segments with the least harm at a share `budget` of the heavy model's cost.

    Args:
        heavy, light: as for `mdkern.sample`. In a mapping the first model is the heavy one, which the others are
            compared with.
        budget: in (0, 1]: what may be spent, as a share of running the most expensive model at every step.
        by: how harm is measured. ``"path_kl"``: KL(heavy || model) of what each segment reveals along the heavy
            model's samples (`path_importance`). ``"kl"``, ``"loss"``: KL or absolute loss difference on held-out text
            at the segments' times (`importance`). ``"influence"``: the results of a search (`influence`), whose number
            of segments is used.
        segments: number of equal parts of the steps. Default 20.
        cost: cost of a step by model: ``"flops"`` as the models count them, ``"time"`` measured here for a batch, or
            numbers by name.
        input_ids: int64 ``[N, L]``, held-out text, for ``"kl"`` and ``"loss"``.
        found: schedules and scores of a search, for ``"influence"``.
        length, num_samples, steps: of the samples for ``"path_kl"``; `length` is also that of the passes for the cost.
        batch_size: texts in a forward pass.

    Raises:
        ValueError: an unknown measure, one that lacks its input or is given another's, models that do not tell their
            FLOPs, and what `best_schedule` refuses; before anything is measured but the time of a pass.
    """
    given = heavy if isinstance(heavy, Mapping) else {"H": heavy, "L": light}
    denoisers, _ = resolve_models(given, None, Schedule.from_segments(list(given)))
    check_inputs(by, input_ids, found)
    if by == "influence" and segments is not None:
        raise ValueError("by='influence' has the segments of the search: leave segments out")
    segments = check_count("segments", 20 if segments is None else segments)
    batch_size, names = check_count("batch_size", batch_size), list(denoisers)
    if length is None:
        length = input_ids.shape[1] if input_ids is not None else denoisers[names[0]].max_length
    prices = costs(cost, denoisers, length, batch_size)
    best_schedule({name: [0.0] for name in names}, prices, budget)  # refuses costs and budgets that can't be
    if by == "influence":
        assert found is not None
        harm = harm_by_influence(names, found)
    else:
        harm = {names[0]: [0.0] * segments}
        for name in names[1:]:
            pair = denoisers[names[0]], denoisers[name]
            common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
            if by == "path_kl":
                common |= {"num_samples": num_samples, "length": length, "steps": steps, "segments": segments}
                harm[name] = [part.revealed_kl.mean for part in path_importance(*pair, **common)]
                continue
            assert input_ids is not None
            times = [1.0 - (segment + 0.5) / segments for segment in range(segments)]
            measured = importance(*pair, input_ids=input_ids, times=times, **common)
            harm[name] = [at.kl.mean if by == "kl" else at.loss_difference.mean for at in measured]
    return best_schedule(harm, prices, budget)


def check_inputs(by: str, input_ids: Tensor | None, found: Sequence[Found] | None) -> None:
    """Refuse a measure without what it needs, and inputs that it would ignore."""
    if by not in MEASURES:
        raise ValueError(f"by must be one of {', '.join(map(repr, MEASURES))}, not {by!r}")
    if input_ids is not None and not (isinstance(input_ids, Tensor) and input_ids.ndim == 2):
        raise TypeError("input_ids must be an integer tensor [N, L]")
    needs = {"input_ids": by in ("kl", "loss"), "found": by == "influence"}
    for name, value in (("input_ids", input_ids), ("found", found)):
        if needs[name] and value is None:
            raise ValueError(f"by={by!r} needs {name}")
        if not needs[name] and value is not None:
            raise ValueError(f"by={by!r} does not read {name}: leave it out")


def harm_by_influence(names: Sequence[str], found: Sequence[Found]) -> dict[str, list[float]]:
    """Influence by segment, of the models less the first one's.

    Where all schedules have equally many segments of the first model, they tell harm up to a constant: influence sums
    to 0, however much every segment suffers. The constant taken here is the least by which each suffers, so that the
    whole budget is used.
    """
    values = influence(found)
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"found has no schedule with model {missing[0]}")
    whole = {name: [value.mean for value in values[name]] for name in names}
    harm = {name: [a - b for a, b in zip(whole[name], whole[names[0]])] for name in names[1:]}
    every = [value for values in harm.values() for value in values]
    least, little = min(every), 1e-6 * (max(every) - min(every) or 1.0)
    return {names[0]: [0.0] * len(whole[names[0]])} | {
        name: [value - least + little for value in values] for name, values in harm.items()
    }


def costs(
    cost: str | Mapping[str, float], denoisers: Mapping[str, Denoiser], length: int | None, batch_size: int
) -> dict[str, float]:
    """The cost of a step by model."""
    if isinstance(cost, Mapping):
        return {name.upper(): float(value) for name, value in cost.items()}
    if cost not in ("flops", "time"):
        raise ValueError(f"cost must be 'flops', 'time' or numbers by model, not {cost!r}")
    if length is None:
        raise ValueError(f"cost={cost!r} needs a length: the models have no longest one")
    if cost == "time":
        return {name: seconds_of_pass(denoiser, length, batch_size) for name, denoiser in denoisers.items()}
    counted = {name: denoiser.flops(length, 1) for name, denoiser in denoisers.items()}
    unknown = [name for name, flops in counted.items() if flops is None]
    if unknown:
        raise ValueError(f"model {unknown[0]} does not tell its FLOPs: give cost='time', or numbers by model")
    return {name: float(flops) for name, flops in counted.items() if flops is not None}


def seconds_of_pass(denoiser: Denoiser, length: int, batch_size: int) -> float:
    """Median seconds of a forward pass of fully masked texts."""
    ids = torch.full((batch_size, length), denoiser.mask_id, device=denoiser.device)
    t = torch.ones(batch_size, device=denoiser.device) if denoiser.time_conditioning else None
    rows = torch.zeros((batch_size, 1), dtype=torch.int64, device=denoiser.device)
    with torch.no_grad():
        seconds = [timed(lambda: denoiser.hidden(ids, t, rows), ids.device)[0] for _ in range(COST_PASSES + 2)]
    return statistics.median(seconds[2:])
