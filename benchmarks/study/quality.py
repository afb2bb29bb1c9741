"""What schedules do to the samples: Sedykh et al., 2604.02340, Figures 1, 7 to 9 and 13, Tables 1 and 2, and beyond."""

from __future__ import annotations

import statistics
from string import ascii_uppercase
from typing import Any

import torch

from benchmarks.harness import seconds
from benchmarks.study.setting import (
    ALL_HEAVY,
    GRID,
    JUDGING,
    Part,
    Study,
    differences,
    events,
    passes,
    sandwich,
)
from mdkern import Schedule, sample
from mdkern.decoders import Ancestral, Decoder, EntropyBound, Threshold, TopProbability
from mdkern.evaluation.intervals import estimate
from mdkern.evaluation.search import Models
from mdkern.evaluation.text import token_entropy

# The paper's, by its names: of 1,000 steps.
HAND_MADE: dict[str, Models] = {
    "L1000": tuple("LLLLLLLL"),
    "L250 H750": tuple("LLHHHHHH"),
    "H250 L250 H500": tuple("HHLLHHHH"),
    "H500 L250 H250": tuple("HHHHLLHH"),
    "H750 L250": tuple("HHHHHHLL"),
    "L125 H750 L125": tuple("LHHHHHHL"),
    "H1000": tuple("HHHHHHHH"),
}
REFERENCE, SANDWICH = "H1000", "L125 H750 L125"
SHARES = tuple(tenth / 10 for tenth in range(11))
GIVEN = 0.25  # of a prompted text
DECODERS: dict[str, Decoder] = {
    "ancestral": Ancestral(),
    "top probability": TopProbability(),
    "threshold 0.9": Threshold(0.9),
    "entropy bound 0.1": EntropyBound(0.1),
}
PLACES = {
    ALL_HEAVY: Schedule.constant("H"),
    "25 % early": Schedule.from_segments("LHHH"),
    "25 % sandwich": Schedule.sandwich(0.25),
    "25 % late": Schedule.from_segments("HHHL"),
    "all light": Schedule.constant("L"),
}


def hand_made(study: Study) -> dict[str, Any]:
    """The paper's schedules, at each ratio of steps to tokens."""
    size = study.size
    rows = []
    for ratio in size.ratios:
        options: dict[str, Any] = {"steps": size.steps(ratio), "num_samples": size.samples}
        rows.append(
            {"ratio": ratio, **options, "points": study.points(HAND_MADE, against=(REFERENCE, SANDWICH), **options)}
        )
    return {"rows": rows}


def hand_made_passes(study: Study) -> float:
    size, costs = study.size, study.cost(study.pair)
    return sum(
        passes(list(HAND_MADE.values()), costs, size.steps(ratio), size.length, size.samples) for ratio in size.ratios
    )


def shares(study: Study) -> dict[str, Any]:
    """Sandwiches of 0, 10, ..., 100 % light steps: the samples, and the seconds of a batch of them."""
    size = study.size
    schedules = {f"{share:.0%}": sandwich(share) for share in SHARES}
    found = study.points(schedules, against=("0%",), steps=size.steps(), num_samples=size.samples)
    for label, share in zip(schedules, SHARES):
        found[label]["seconds"] = clock(study, Schedule.sandwich(share))
    whole = statistics.median(found["0%"]["seconds"])
    for point in found.values():
        point["clock_saved"] = 1.0 - statistics.median(point["seconds"]) / whole
    return {"steps": size.steps(), "num_samples": size.samples, "batch_size": size.batch_size, "points": found}


def shares_passes(study: Study) -> float:
    size, costs = study.size, study.cost(study.pair)
    schedules = [sandwich(share) for share in SHARES]
    timed = sum(sum(costs[name] for name in schedule) / GRID for schedule in schedules)
    timed *= size.batch_size * (size.clock_runs + 1) * events(size.steps(), size.length)
    return timed + passes(schedules, costs, size.steps(), size.length, size.samples)


def clock(study: Study, schedule: Schedule) -> list[float]:
    """Seconds of runs of one batch, after one that captures graphs."""
    size = study.size
    options: dict[str, Any] = {"num_samples": size.batch_size, "batch_size": size.batch_size, "length": size.length}
    took = []
    for number in range(size.clock_runs + 1):
        spent, _ = seconds(
            lambda: sample(study.pair, schedule, steps=size.steps(), seed=study.seed, progress=False, **options),
            study.device.type,
        )
        if number:
            took.append(spent)
    return took


def light_size(study: Study) -> dict[str, Any]:
    """A sandwich with a quarter of light steps, by light models of different depths.

    Rows of models that are not at hand any more are kept as they were.
    """
    names = [study.light, *study.between]
    letters = dict(zip((letter for letter in ascii_uppercase if letter != "H"), names))
    models = {"H": study.models[study.heavy]} | {letter: study.models[name] for letter, name in letters.items()}
    schedules = {ALL_HEAVY: sandwich(0.0)}
    for letter, name in letters.items():
        schedules[name] = tuple(letter if model == "L" else model for model in sandwich(0.25))
    size = study.size
    options: dict[str, Any] = {"steps": size.steps(), "num_samples": size.samples}
    points = study.points(schedules, models=models, **options)
    blocks = {name: study.models[name].config.num_blocks for name in names}
    return {
        **options,
        "heavy_blocks": study.models[study.heavy].config.num_blocks,
        "blocks": study.with_earlier("light_size", "blocks", blocks),
        "points": study.with_earlier("light_size", "points", points),
    }


def light_size_passes(study: Study) -> float:
    size, runs = study.size, 2 + len(study.between)
    return runs * size.samples * (events(size.steps(), size.length) + JUDGING)


def prompted(study: Study) -> dict[str, Any]:
    """The paper's schedules with the first quarter of held-out texts given; only what was written is judged."""
    size = study.size
    given = max(2, round(GIVEN * size.length))
    ids = study.texts(size.samples).clone()
    ids[:, given:] = study.pair["H"].config.mask_id
    points = study.points(HAND_MADE, against=(REFERENCE, SANDWICH), given=given, input_ids=ids, steps=size.steps())
    return {"steps": size.steps(), "given": given, "num_samples": len(ids), "points": points}


def prompted_passes(study: Study) -> float:
    size = study.size
    length = size.length - max(2, round(GIVEN * size.length))
    return passes(list(HAND_MADE.values()), study.cost(study.pair), size.steps(), length, size.samples)


def decoders(study: Study) -> dict[str, Any]:
    """Where the light steps may lie when the model chooses the order."""
    size = study.size
    options: dict[str, Any] = {"num_samples": size.decoder_samples, "length": size.length, "steps": size.steps()}
    found: dict[str, Any] = {}
    for name, decoder in DECODERS.items():
        points, scores = dict[str, Any](), dict[str, torch.Tensor]()
        for label, schedule in PLACES.items():
            out = sample(
                study.pair,
                schedule,
                decoder=decoder,
                batch_size=size.batch_size,
                seed=study.seed,
                progress=False,
                **options,
            )
            assert out.sequences is not None
            assert out.nfe is not None
            scores[label] = study.score(out.sequences)
            points[label] = {
                "score": estimate(scores[label]).as_dict(),
                "token_entropy": estimate(token_entropy(out.sequences.cpu())).as_dict(),
                "passes": {model: float(number.double().mean()) for model, number in out.nfe.items()},
            }
        for label, point in points.items():
            point["over"] = differences(scores[label], {base: scores[base] for base in (ALL_HEAVY, "25 % sandwich")})
        found[name] = points
    return {**options, "decoders": found}


def decoders_passes(study: Study) -> float:
    """At most one pass a token; their output layer runs at every masked position, which is counted as half a pass."""
    light = study.cost(study.pair)["L"]
    costs = sum(float(s.shares().get("H", 0)) + light * float(s.shares().get("L", 0)) for s in PLACES.values())
    return study.size.decoder_samples * len(DECODERS) * (1.5 * study.size.length * costs + JUDGING * len(PLACES))


PARTS = {
    "hand_made": Part(hand_made, hand_made_passes),
    "shares": Part(shares, shares_passes),
    "light_size": Part(
        light_size,
        light_size_passes,
        between=True,
        whole=lambda study, found: {study.light, *study.between} <= set(found["points"]),
    ),
    "prompted": Part(prompted, prompted_passes, text=True),
    "decoders": Part(decoders, decoders_passes),
}
