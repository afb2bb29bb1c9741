"""Likelihoods of held-out text, of models and under schedules: the any-order bound, and the exact one of a sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.quality import HAND_MADE, PLACES, REFERENCE, SANDWICH
from benchmarks.study.setting import ALL_HEAVY, Part, Study, differences
from mdkern import DiT, Schedule
from mdkern.decoders import Decoder, EntropyBound, Margin, Threshold, TopProbability
from mdkern.evaluation.intervals import estimate, rank_correlation
from mdkern.evaluation.likelihood import likelihood

# Decoders whose order is a function of the text so far, and by what they choose where that would be the drawn token.
ORDERS: dict[str, tuple[Decoder, str | None]] = {
    "top probability": (TopProbability(), "top1"),
    "margin": (Margin(), None),
    "threshold 0.9": (Threshold(0.9), "top1"),
    "entropy bound 0.1": (EntropyBound(0.1), None),
}


def any_order(study: Study, models: Mapping[str, DiT] | DiT, schedule: Schedule | None, ids: Tensor) -> Tensor:
    """The any-order bound of texts, nats a token, float64 ``[N]`` on the CPU; on the same masks whatever the models."""
    size = study.size
    found = likelihood(
        models, None, schedule, input_ids=ids, samples=size.masks, batch_size=size.batch_size, seed=study.seed
    )
    return (found.nats / found.tokens).cpu()


def bounds(study: Study) -> dict[str, Any]:
    """The any-order bound of held-out text of each model by itself; those of models not at hand any more are kept."""
    ids = study.texts(study.size.windows)
    bound = {name: any_order(study, model, None, ids) for name, model in study.models.items()}
    points = {
        name: {
            "blocks": study.models[name].config.num_blocks,
            "parameters": sum(parameter.numel() for parameter in study.models[name].parameters()),
            "bound": estimate(value).as_dict(),
            "over": differences(value, {study.heavy: bound[study.heavy]}),
        }
        for name, value in bound.items()
    }
    return {
        "windows": len(ids),
        "masks": study.size.masks,
        "heavy": study.heavy,
        "points": study.with_earlier("bounds", "points", points),
    }


def bounds_passes(study: Study) -> float:
    return study.size.windows * study.size.masks * sum(study.cost(study.models).values())


def order(study: Study) -> dict[str, Any]:
    """The exact likelihood of held-out text by samplers that choose their order, for light steps in different places.

    It is a property of the sampler, which texts that repeat themselves do not improve.
    """
    size, ids = study.size, study.texts(study.size.windows)
    found: dict[str, Any] = {}
    for name, (decoder, by) in ORDERS.items():
        nats, passes = dict[str, Tensor](), dict[str, Any]()
        for label, schedule in PLACES.items():
            exact = likelihood(
                study.pair,
                None,
                schedule,
                input_ids=ids,
                method="decoder",
                decoder=decoder,
                by=by,
                steps=size.steps(),
                batch_size=size.batch_size,
                progress=False,
            )
            nats[label] = (exact.nats / exact.tokens).cpu()
            passes[label] = {model: float(number.double().mean()) for model, number in exact.nfe.items()}
        found[name] = {
            label: {
                "nats": estimate(value).as_dict(),
                "over": differences(value, {base: nats[base] for base in (ALL_HEAVY, "25 % sandwich")}),
                "passes": passes[label],
            }
            for label, value in nats.items()
        }
    random_order = {label: any_order(study, study.pair, schedule, ids) for label, schedule in PLACES.items()}
    return {
        "windows": len(ids),
        "steps": size.steps(),
        "decoders": found,
        "any_order": {
            label: {
                "nats": estimate(value).as_dict(),
                "over": differences(value, {base: random_order[base] for base in (ALL_HEAVY, "25 % sandwich")}),
            }
            for label, value in random_order.items()
        },
    }


def order_passes(study: Study) -> float:
    """At most a pass a token, with the output layer at all that is masked; and the bound's."""
    light = study.cost(study.pair)["L"]
    costs = sum(float(s.shares().get("H", 0)) + light * float(s.shares().get("L", 0)) for s in PLACES.values())
    return study.size.windows * costs * (1.5 * study.size.length * len(ORDERS) + study.size.masks)


def yardstick(study: Study) -> dict[str, Any]:
    """The any-order bound of held-out text under the paper's schedules, beside the judge's score of their samples."""
    size, ids = study.size, study.texts(study.size.windows)
    bound = {
        label: any_order(study, study.pair, Schedule.from_segments(schedule), ids)
        for label, schedule in HAND_MADE.items()
    }
    rows = {row["ratio"]: row["points"] for row in study.found["hand_made"]["rows"]}
    judged = {label: point["score"]["mean"] for label, point in rows[1.0].items()}
    mean = torch.tensor([float(bound[label].mean()) for label in HAND_MADE])
    return {
        "windows": len(ids),
        "masks": size.masks,
        "points": {
            label: {
                "bound": estimate(bound[label]).as_dict(),
                "over": differences(bound[label], {base: bound[base] for base in (REFERENCE, SANDWICH)}),
                "judge": rows[1.0][label]["score"],
            }
            for label in HAND_MADE
        },
        "rank_correlation": rank_correlation(mean, torch.tensor([judged[label] for label in HAND_MADE])),
    }


def yardstick_passes(study: Study) -> float:
    costs = study.cost(study.pair)
    return study.size.windows * study.size.masks * sum(sum(map(costs.__getitem__, s)) / 8 for s in HAND_MADE.values())


PARTS = {
    "yardstick": Part(yardstick, yardstick_passes, needs=("hand_made",), text=True),
    "order": Part(order, order_passes, text=True),
    "bounds": Part(
        bounds, bounds_passes, text=True, whole=lambda study, found: set(study.models) <= set(found["points"])
    ),
}
