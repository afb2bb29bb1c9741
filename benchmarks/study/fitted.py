"""Which steps need the heavy model, by search and by measures; and schedules fitted from them against the sandwich.

Sedykh et al., 2604.02340, Figures 2 to 6 and 10; what the fitted schedules are worth no paper says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import torch

from benchmarks.study.setting import (
    ALL_HEAVY,
    GRID,
    JUDGING,
    Part,
    Study,
    events,
    passes,
    sandwich,
    segments_of,
    spread,
)
from mdkern.engine.branches import run_schedules, share_of_passes
from mdkern.evaluation.assignment import best_schedule
from mdkern.evaluation.importance import importance, path_importance
from mdkern.evaluation.intervals import estimate, paired, rank_correlation
from mdkern.evaluation.search import Models, Results, all_schedules, best_and_mean, frequencies, influence
from mdkern.evaluation.search import search as search_schedules

MEASURES = "loss", "kl", "path_kl", "masked_kl"
BUDGETS = 0.1, 0.25, 0.4, 0.5, 0.7  # light steps
HELD_OUT_SEED = 1  # added to the study's: no sample of it was seen in the search or on the path
FITTED_BY = (*MEASURES, "influence")


def search(study: Study) -> dict[str, Any]:
    """Every schedule with so many light segments; goes on with what an interrupted one has left beside the results."""
    size = study.size
    schedules = all_schedules(size.segments, size.light_segments)
    options: dict[str, Any] = {
        "length": size.length,
        "steps": size.steps(),
        "num_samples": size.search_samples,
        "seed": study.seed,
    }
    setting = study.setting() | {"search": options | {"segments": size.segments, "light": size.light_segments}}
    results = Results(study.search_file, setting)

    def run(left: list[Models]) -> Any:
        return run_schedules(study.pair, left, batch_size=size.batch_size, **options)

    found = search_schedules(run, study.score, schedules, results)
    best, over_mean = best_and_mean(found)
    frequent, rare = frequencies(found, "L")
    heavy = next(study.score(sequences) for _, sequences in run([("H",) * size.segments]))
    over_heavy = paired(torch.stack([entry.scores for entry in found]).mean(0), heavy)
    values = influence(found)
    return {
        **options,
        "segments": size.segments,
        "light_segments": size.light_segments,
        "share_of_passes": share_of_passes(schedules),
        "ranked": [{"models": entry.name, "score": estimate(entry.scores).as_dict()} for entry in found],
        "best_over_mean": over_mean.as_dict(),
        "best": best.name,
        "frequency_best_tenth": frequent,
        "frequency_worst_tenth": rare,
        "mean_over_heavy": over_heavy.as_dict(),
        "influence": {name: [value.as_dict() for value in values[name]] for name in values},
        "harm": additive_harm([value.mean for value in values["L"]], size.light_segments, over_heavy.mean),
    }


def additive_harm(influence: Sequence[float], light: int, over_heavy: float) -> list[float]:
    """What a light segment adds to the score over all heavy, if harms add up.

    Of schedules that have k of n segments light, influence (eq. 8) is ``(n - k) / (n - 1)`` times a segment's harm less
    the mean harm of all: it sums to 0, so it does not tell the mean harm, which the schedules' mean score over all
    heavy does.
    """
    count = len(influence)
    return [value * (count - 1) / (count - light) + over_heavy / light for value in influence]


def search_passes(study: Study) -> float:
    size = study.size
    schedules = all_schedules(size.segments, size.light_segments)
    schedules.append(("H",) * size.segments)
    return passes(schedules, study.cost(study.pair), size.steps(), size.length, size.search_samples)


def measures(study: Study) -> dict[str, Any]:
    """Loss difference and KL over the diffusion time, in the middle of each segment, in the order of sampling."""
    size = study.size
    times = [1.0 - (segment + 0.5) / size.times for segment in range(size.times)]
    texts = study.texts(size.windows)
    found = importance(
        study.models[study.heavy],
        study.models[study.light],
        input_ids=texts,
        baseline=None if study.baseline is None else study.models[study.baseline],
        times=times,
        batch_size=size.batch_size,
        seed=study.seed,
    )
    return {
        "windows": len(texts),
        "times": times,
        "baseline": study.baseline,
        "loss": [at.loss_difference.as_dict() for at in found],
        "heavy_loss": [at.heavy_loss.as_dict() for at in found],
        "light_loss": [at.light_loss.as_dict() for at in found],
        "kl": [at.kl.as_dict() for at in found],
        "baseline_kl": [at.baseline_kl.as_dict() for at in found if at.baseline_kl is not None],
    }


def measures_passes(study: Study) -> float:
    size, light = study.size, study.cost(study.pair)["L"]
    return size.windows * size.times * (1.0 + light + (study.baseline is not None))


def path(study: Study) -> dict[str, Any]:
    """The KL along the heavy model's own samples."""
    return along(study, study.light)


def along(study: Study, light: str) -> dict[str, Any]:
    """Of one light model, by segments in the order of sampling."""
    size = study.size
    found = path_importance(
        study.models[study.heavy],
        study.models[light],
        num_samples=size.path_samples,
        length=size.length,
        steps=size.steps(),
        segments=size.times,
        batch_size=size.batch_size,
        seed=study.seed,
    )
    return {
        "light": light,
        "path_samples": size.path_samples,
        "steps": size.steps(),
        "path_kl": [at.revealed_kl.as_dict() for at in found],
        "masked_kl": [at.masked_kl.as_dict() for at in found],
    }


def path_passes(study: Study) -> float:
    size, light = study.size, study.cost(study.pair)["L"]
    return size.path_samples * ((events(size.steps(), size.length) + size.times) * (1.0 + light) + size.length)


def measured(study: Study) -> dict[str, Any]:
    """What has been measured of importance: without held-out text that is along the path alone."""
    known: dict[str, Any] = study.found["path"] | study.found.get("measures", {})
    return known


def prediction(study: Study) -> dict[str, Any]:
    """How well each measure ranks the segments as their influence does, and the schedules as their scores do."""
    found = study.found["search"]
    segments = found["segments"]
    harm = torch.tensor([value["mean"] for value in found["influence"]["L"]])
    scores = torch.tensor([entry["score"]["mean"] for entry in found["ranked"]])
    out: dict[str, Any] = {}
    known = measured(study)
    for name in (name for name in MEASURES if name in known):
        values = harms(known, name, segments)
        sums = torch.tensor([sum(v for v, m in zip(values, entry["models"]) if m == "L") for entry in found["ranked"]])
        out[name] = {
            "by_segment": values,
            "segments": rank_correlation(torch.tensor(values), harm),
            "schedules": rank_correlation(sums, scores),
        }
    light = torch.tensor([[m == "L" for m in entry["models"]] for entry in found["ranked"]]).float()
    return {
        "influence": harm.tolist(),
        "count": segments,
        "measures": out,
        "influence_schedules": rank_correlation(light @ harm, scores),
    }


def still_predicted(study: Study, found: dict[str, Any]) -> bool:
    """Whether the measures, if they are at hand, predict what they did."""
    return not {"search", "path"} <= set(study.found) or bool(prediction(study) == found)


def harms(known: Mapping[str, Any], name: str, segments: int) -> list[float]:
    """A measure in so many segments: neighbours' sum, or each one's value shared out.

    The KL of two equally good models is taken off, where there is one (eq. 7).
    """
    values = [value["mean"] for value in known[name]]
    if name == "kl" and known["baseline_kl"]:
        values = [value - base["mean"] for value, base in zip(values, known["baseline_kl"])]
    return resample(values, segments)


def resample(values: Sequence[float], segments: int) -> list[float]:
    """Additive values of equal segments, in another number of equal segments that divides or is a multiple of theirs.

    Raises:
        ValueError: neither is a multiple of the other.
    """
    if segments % len(values) == 0:
        times = segments // len(values)
        return [value / times for value in values for _ in range(times)]
    if len(values) % segments:
        raise ValueError(f"{len(values)} segments cannot be written as {segments}")
    times = len(values) // segments
    return [sum(values[first : first + times]) for first in range(0, len(values), times)]


def cheapest_for(light: float, costs: Mapping[str, float]) -> float:
    """The budget of a schedule with a share `light` of light steps: of running the heavy model everywhere."""
    return 1.0 - light * (1.0 - costs["L"])


def fit(harm: Sequence[float], light: float, costs: Mapping[str, float]) -> Models:
    """The schedule that harms least of those that cost what a share `light` of light steps does, in `GRID` segments.

    A measured harm may be below 0 by chance. So that all schedules of a budget cost the same, each is raised by as much
    as makes the least of them positive, which changes no order.
    """
    raised = [value - min(harm) + (max(harm) - min(harm) or 1.0) for value in harm]
    chosen = best_schedule({"H": [0.0] * len(harm), "L": raised}, costs, cheapest_for(light, costs))
    return segments_of(chosen, GRID)


def fitted(study: Study) -> dict[str, Any]:
    """Schedules fitted by each measure against the sandwich of the same FLOPs, on seeds that none of them has seen."""
    costs = study.cost(study.pair)
    searched = study.found["search"]
    known = measured(study)
    harm = {name: harms(known, name, GRID // 2) for name in MEASURES if name in known}
    harm["influence"] = resample(searched["harm"], GRID // 2)
    plans: dict[float, dict[str, Models]] = {}
    for share in BUDGETS:
        plans[share] = {"sandwich": sandwich(share), ALL_HEAVY: sandwich(0.0)}
        for name, values in harm.items():
            plans[share][name] = fit(values, share, costs)
        if share == searched["light_segments"] / searched["segments"]:
            plans[share]["best of the search"] = spread(tuple(searched["best"]), GRID)
    return held_out(study, plans)


def held_out(
    study: Study, plans: Mapping[float, Mapping[str, Models]], models: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Points of schedules by budget and name, on the seeds that are held out, against what each budget's others are.

    All are run together, so that those that begin alike share it.
    """
    size, seed = study.size, study.seed + HELD_OUT_SEED
    flat = {(share, name): schedule for share, plan in plans.items() for name, schedule in plan.items()}
    labels = {key: f"{key[0]} {key[1]}" for key in flat}
    against = [labels[key] for key in flat if key[1] in ("sandwich", ALL_HEAVY)]
    options: dict[str, Any] = {"steps": size.steps(), "num_samples": size.samples, "seed": seed, "against": against}
    points = study.points({labels[key]: schedule for key, schedule in flat.items()}, models=models, **options)
    rows = []
    for share, plan in plans.items():
        own = {name: points[labels[share, name]] for name in plan}
        for point in own.values():
            bases = [name for name in ("sandwich", ALL_HEAVY) if name in plan]
            point["over"] = {name: point["over"][labels[share, name]] for name in bases}
        rows.append({"light": share, "points": own})
    return {"steps": size.steps(), "num_samples": size.samples, "seed": seed, "rows": rows}


def fitted_passes(study: Study) -> float:
    """As if no two measures gave the same schedule, and none began like another."""
    size, light = study.size, study.cost(study.pair)["L"]
    runs = 1.0 + sum((len(FITTED_BY) + 1) * (1.0 - share * (1.0 - light)) for share in BUDGETS)
    judged = JUDGING * ((len(FITTED_BY) + 1) * len(BUDGETS) + 1)
    return size.samples * (runs * events(size.steps(), size.length) + judged)


def three_models(study: Study) -> dict[str, Any]:
    """Each model between the two as a third, at the FLOPs of each sandwich of two: fitted by the path KL, and by hand.

    What is fitted is what `Schedule.optimize` gives for each budget; a path is walked once for all of them.
    """
    letters = dict(zip(ascii_uppercase[12:], study.between))  # from M on
    models = {"H": study.models[study.heavy], "L": study.models[study.light]}
    models |= {letter: study.models[name] for letter, name in letters.items()}
    costs = study.cost(models)
    harm = {"H": [0.0] * (GRID // 2)}
    for letter, name in {"L": study.light, **letters}.items():
        harm[letter] = harms(along(study, name), "path_kl", GRID // 2)

    def best(names: str, share: float) -> Models:
        chosen = best_schedule({n: harm[n] for n in names}, {n: costs[n] for n in names}, cheapest_for(share, costs))
        return segments_of(chosen, GRID)

    plans: dict[float, dict[str, Models]] = {}
    for share in BUDGETS:
        plans[share] = {"sandwich": sandwich(share), "two models": best("HL", share)}
        for letter, name in letters.items():
            plans[share][f"{name}, fitted"] = best(f"H{letter}L", share)
            plans[share][f"{name}, by hand"] = terraces(share, costs, letter)
    return {"letters": letters, **held_out(study, plans, models)}


def terraces(light: float, costs: Mapping[str, float], middle: str = "M") -> Models:
    """A sandwich of three, `L M H M L`, of the sandwich's cost or a little less.

    It has two thirds of the sandwich's light steps, and as many of M, the middle model, as save what the last third
    saves. If M saves too little for that, more light ones.
    """
    wanted = light * GRID * (1.0 - costs["L"])  # saved, in heavy segments
    few = round(light * GRID / 3)  # of L, at each end

    def needed() -> int:  # of M, at each end
        return max(0, math.ceil((wanted - 2 * few * (1.0 - costs["L"])) / (1.0 - costs[middle]) / 2 - 1e-9))

    while needed() > GRID // 2 - few:
        few += 1
    side = ("L",) * few + (middle,) * needed()
    return side + ("H",) * (GRID - 2 * len(side)) + side[::-1]


def three_models_passes(study: Study) -> float:
    size, light = study.size, study.cost(study.pair)["L"]
    kinds = 2 + 2 * len(study.between)
    runs = sum(kinds * cheapest_for(share, {"L": light}) for share in BUDGETS)
    compared = size.samples * (runs * events(size.steps(), size.length) + kinds * JUDGING * len(BUDGETS))
    return compared + (1 + len(study.between)) * path_passes(study)


PARTS = {
    "measures": Part(
        measures,
        measures_passes,
        text=True,
        whole=lambda study, found: study.baseline in (None, found["baseline"]),
    ),
    "path": Part(path, path_passes),
    "search": Part(search, search_passes),
    "prediction": Part(prediction, lambda _: 0.0, needs=("search", "path"), whole=still_predicted),
    "fitted": Part(fitted, fitted_passes, needs=("search", "path")),
    "three_models": Part(
        three_models,
        three_models_passes,
        between=True,
        whole=lambda study, found: set(study.between) <= set(found["letters"].values()),
    ),
}
