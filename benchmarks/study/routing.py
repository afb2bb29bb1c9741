"""Routing by entropy against fixed schedules of the same cost, where the order does not look at the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.study.setting import ALL_HEAVY, JUDGING, Part, Study, differences
from mdkern import EntropyRouter, SampleOutput, Schedule, adapt, sample
from mdkern.decoders import Choice, Proposal, Stepwise, View
from mdkern.evaluation.intervals import estimate
from mdkern.evaluation.search import Models
from mdkern.evaluation.text import token_entropy
from mdkern.kernels import vocab_projection

# Between which quantiles of the heavy model's entropies the router runs it: light at both ends, or at the beginning.
QUANTILES = (0.125, 0.875), (0.25, 0.75), (0.0, 0.75)
ROUTER, SAME_PLACES = "router", "same places"


@dataclass(frozen=True)
class OneByOne(Stepwise):
    """One position at a step, each masked one as likely: the order in which `Ancestral` reveals them.

    A router needs a decoder that is called at every step, which `Ancestral` is not. With the same seed the order is
    the same whatever the models.
    """

    scores_draw: ClassVar[bool] = False

    def choose(self, view: View, proposal: Proposal) -> Choice:
        count = view.masked.sum(-1).clamp(max=1)
        return Choice(torch.zeros_like(view.confidence), view.masked, "top_k", quota=count, temperature=1.0)


def routing(study: Study) -> dict[str, Any]:
    """Each router against the fixed schedules that run the heavy model as often as it did on average."""
    size = study.size
    heavy = draw(study, Schedule.constant("H"))
    entropies = path_entropies(study, heavy)
    bands = []
    for low, high in QUANTILES:
        lower = 0.0 if low == 0.0 else float(entropies.quantile(low))
        upper = float(entropies.quantile(high))
        out = draw(study, EntropyRouter(lower, upper))
        assert out.nfe is not None
        count = round(float(out.nfe["H"].double().mean()))
        outs = {ROUTER: out} | {name: draw(study, fixed) for name, fixed in fixed_schedules(out, count).items()}
        bands.append({"quantiles": [low, high], "lower": lower, "upper": upper, "points": describe(study, outs, heavy)})
    return {
        "num_samples": size.samples,
        "length": size.length,
        "seed": study.seed,
        ALL_HEAVY: describe(study, {ALL_HEAVY: heavy}, heavy)[ALL_HEAVY],
        "bands": bands,
    }


def draw(study: Study, schedule: Any) -> SampleOutput:
    """Samples in as many steps as tokens, on the study's seed, under a `Schedule` or a `Router`."""
    size = study.size
    return sample(
        study.pair,
        schedule=schedule,
        decoder=OneByOne(),
        num_samples=size.samples,
        length=size.length,
        steps=size.length,
        batch_size=size.batch_size,
        seed=study.seed,
        return_history=True,
        progress=False,
    )


def path_entropies(study: Study, out: SampleOutput) -> Tensor:
    """The heavy model's mean entropy over the masked positions before steps of its samples, float32."""
    size, model = study.size, adapt(study.pair["H"])
    assert out.sequences is not None
    assert out.history is not None
    found = []
    steps = [size.length * (2 * part + 1) // (2 * size.times) for part in range(size.times)]
    for step in steps:
        drafts = out.history.draft(out.sequences, step, model.mask_id)[: size.path_samples]
        found += [mean_entropy(model, part) for part in drafts.split(size.batch_size)]
    return torch.cat(found)


@torch.no_grad()
def mean_entropy(model: Any, ids: Tensor) -> Tensor:
    """Mean entropy of the masked positions of each text, nats, float32 ``[B]``."""
    masked = ids == model.mask_id
    rows = masked.flatten().nonzero()[:, 0]
    seed, keys = torch.zeros((), dtype=torch.int64, device=ids.device), rows.new_zeros(len(rows), 3)
    hidden = model.hidden(ids).flatten(0, 1)
    head = model.head
    options: dict[str, Any] = {"scale": head.scale, "soft_cap": head.soft_cap, "want_entropy": True}
    entropy = vocab_projection(hidden, head.weight, head.bias, rows, 0.0, seed, keys, **options).entropy
    assert entropy is not None
    total = torch.zeros(len(ids), device=ids.device).index_add(0, rows // ids.shape[1], entropy)
    return total / masked.sum(-1)


def fixed_schedules(out: SampleOutput, count: int) -> dict[str, Schedule]:
    """Schedules with `count` heavy steps: in the middle, at the end, and where the router's most often were."""
    assert out.history is not None
    history = out.history
    length = history.step.shape[1]
    steps = torch.arange(length, device=history.step.device)
    heavy = history.model == history.models.index("H")
    often = torch.stack([(heavy & (history.step == step)).sum() for step in steps])
    taken = set(often.argsort(descending=True, stable=True)[:count].tolist())
    few = (length - count) // 2
    chosen: dict[str, Models] = {
        "sandwich": ("L",) * few + ("H",) * count + ("L",) * (length - count - few),
        "light first": ("L",) * (length - count) + ("H",) * count,
        SAME_PLACES: tuple("H" if step in taken else "L" for step in range(length)),
    }
    return {name: Schedule.from_segments(models) for name, models in chosen.items()}


def describe(study: Study, outs: dict[str, SampleOutput], heavy: SampleOutput) -> dict[str, Any]:
    """Judge's scores, with differences from the others by pairs."""
    scores = {name: judged(study, out) for name, out in outs.items()}
    bases = {ALL_HEAVY: judged(study, heavy)} | scores
    found: dict[str, Any] = {}
    for name, out in outs.items():
        assert out.nfe is not None
        assert out.sequences is not None
        passes = {model: float(count.double().mean()) for model, count in out.nfe.items()}
        found[name] = {
            "heavy_share": passes["H"] / sum(passes.values()),
            "passes": passes,
            "token_entropy": estimate(token_entropy(out.sequences.cpu())).as_dict(),
            "score": estimate(scores[name]).as_dict(),
            "over": differences(scores[name], bases),
        }
    return found


def judged(study: Study, out: SampleOutput) -> Tensor:
    assert out.sequences is not None
    return study.score(out.sequences)


def routing_passes(study: Study) -> float:
    """Half of the passes of each run light; their output layer runs at every masked position."""
    size, light = study.size, study.cost(study.pair)["L"]
    runs = 1.0 + 4 * len(QUANTILES) * (1.0 + light) / 2
    return size.samples * runs * (1.5 * size.length + JUDGING)


PARTS = {"routing": Part(routing, routing_passes)}
