"""Tables and verdicts of docs/learning.md, drawn from ``benchmarks/results/learning-problems.json``.

A verdict is a sentence made of the numbers: it says what they say, whichever way they fall. What has not been measured
has one line that says so. Means over seeds are given with the standard error of the mean over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS
from benchmarks.kernel_tables import markdown

FILE = "learning-problems.json"
ABSENT = "Not measured yet.\n"
MODELS = {
    "base": "base",
    "masked": "masked only, own answers",
    "supervised": "LLaDA's objective, own answers",
    "masked_true": "masked only, true answers",
    "uniform": "uniform noise, own answers",
    "oput": "on-policy (OPUT), own answers",
}
DECODERS = {
    "threshold": "threshold",
    "run": "leftmost run",
    "revision": "run, revised",
    "soft": "run, revised, soft inputs",
}
RULES = "threshold", "run"  # the ways that any masked model can be decoded in
REFERENCE = "base", "threshold", 0.95  # whose strict accuracy others are held to, less the margin
MARGIN = 0.01
CLAIM = 1.5  # times, DMax's claim as it is asked here
COUNTS = {"tokens_per_pass": "decoding passes only", "tokens_per_forward": "all passes, commits of the cache too"}
Curve = Sequence[Mapping[str, Any]]
Cell = tuple[str, Sequence[str]]  # a model, and ways of decoding of which the best is taken


class Mean(NamedTuple):
    """A mean over seeds, and its standard error (NaN for one seed)."""

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")


def mean_of(values: Sequence[float]) -> Mean:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), error, len(values))


def content() -> dict[str, Any] | None:
    path = RESULTS / FILE
    return json.loads(path.read_text()) if path.exists() else None


def seeds_with(shown: Mapping[str, Any], *parts: str) -> list[dict[str, Any]]:
    """What each seed that has all of these parts has found, by part."""
    return [
        {name: part["found"] for name, part in seed.items()}
        for seed in shown["seeds"].values()
        if all(part in seed for part in parts)
    ]


def caption(shown: Mapping[str, Any], part: str) -> str:
    known = [seed[part]["environment"] for seed in shown["seeds"].values() if part in seed]
    seeds = f"{len(known)} seed{'s' * (len(known) != 1)}"
    return f"{known[0]['device']}, torch {known[0]['torch']}; {seeds}"


def target(seed: Mapping[str, Any]) -> float:
    """The strict accuracy that a way of decoding is held to."""
    model, decoder, threshold = REFERENCE
    points = seed[f"eval_{model}"]["curves"][decoder]
    careful = min(points, key=lambda point: abs(point["threshold"] - threshold))
    return float(careful["strict"]["mean"]) - MARGIN


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


def best(seed: Mapping[str, Any], cell: Cell, count: str) -> float:
    """The most tokens a pass of a model with the best of some ways of decoding, at the accuracy that is asked for."""
    model, decoders = cell
    curves = seed[f"eval_{model}"]["curves"]
    values = [most_tokens(curves[decoder], target(seed), count) for decoder in decoders]
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def ratio(seeds: Sequence[Mapping[str, Any]], above: Cell, below: Cell, count: str) -> Mean | None:
    """How many times as many tokens a pass one (model, ways of decoding) has as another, by seed.

    None if one of them does not reach the accuracy for some seed.
    """
    pairs = [(best(seed, above, count), best(seed, below, count)) for seed in seeds]
    if not pairs or not all(value > 0 for pair in pairs for value in pair):
        return None
    return mean_of([ours / theirs for ours, theirs in pairs])


STEPS: dict[str, tuple[Cell, Cell]] = {  # what the gain is made of: each is what is above over what is below
    "self-distillation": (("masked", RULES), ("base", RULES)),
    "self-distillation with LLaDA's objective": (("supervised", RULES), ("base", RULES)),
    "more training on true answers": (("masked_true", RULES), ("base", RULES)),
    "on-policy training, decoded as before": (("oput", RULES), ("masked", RULES)),
    "revision, of the on-policy model": (("oput", ("revision",)), ("oput", RULES)),
    "soft inputs, over revision": (("oput", ("soft",)), ("oput", ("revision",))),
    "revision, of the masked-only model": (("masked", ("revision",)), ("masked", RULES)),
    "on-policy instead of uniform noise, best decoder": (("oput", tuple(DECODERS)), ("uniform", tuple(DECODERS))),
}
STRONGEST: tuple[Cell, Cell] = ("oput", ("soft",)), ("supervised", RULES)
WHOLE: tuple[Cell, Cell] = ("oput", ("soft",)), ("masked", RULES)


def evaluated(shown: Mapping[str, Any], *models: str) -> list[dict[str, Any]]:
    return seeds_with(shown, *(f"eval_{model}" for model in models))


def verdict(found: Mean) -> str:
    """Whether a ratio reaches DMax's, with two standard errors on either side."""
    if math.isnan(found.error):
        return "one seed, no standard error"
    if found.mean - 2 * found.error >= CLAIM:
        return "the claim holds beyond two standard errors"
    if found.mean + 2 * found.error < CLAIM:
        return "the claim does not hold, beyond two standard errors"
    return "within two standard errors of the claim: undecided"


def headline(shown: Mapping[str, Any]) -> str:
    """DMax's claim at this scale, in a sentence."""
    seeds = evaluated(shown, "base", "masked", "oput")
    if not seeds:
        return ABSENT
    sentences = []
    for count, label in COUNTS.items():
        found = ratio(seeds, *WHOLE, count)
        if found is None:
            sentences.append(f"counting {label}, one of the two does not reach the accuracy")
        else:
            sentences.append(f"{found} × as many tokens a pass counting {label} ({verdict(found)})")
    accuracy = mean_of([100 * (target(seed) + MARGIN) for seed in seeds])
    return (
        f"> Word problems, {len(seeds)} seeds, strict accuracy within one point of the base model's at threshold "
        f"{REFERENCE[2]} ({accuracy} %): on-policy training with soft inputs against the masked-only control with the "
        f"best threshold rule has {'; '.join(sentences)}. DMax's claim as it is asked here is {CLAIM} ×. ± is a "
        "standard error over seeds.\n"
    )


def parts(shown: Mapping[str, Any]) -> str:
    """What the gain is made of."""
    body = []
    for name, (above, below) in {
        **STEPS,
        "**all of it: OPUT + soft over masked only**": WHOLE,
        "**OPUT + soft over LLaDA's objective on the same answers**": STRONGEST,
    }.items():
        seeds = evaluated(shown, "base", above[0], below[0])
        cells = [ratio(seeds, above, below, count) for count in COUNTS]
        body.append([name, *("–" if cell is None else f"{cell} ×" for cell in cells), f"{len(seeds)}"])
    if all(row[-1] == "0" for row in body):
        return ABSENT
    return markdown(["what", *COUNTS.values(), "seeds"], body) + (
        "\nTokens a pass at that accuracy, of the one over those of the other; – where one of the two does not reach "
        "it at any threshold.\n"
    )


def cells(shown: Mapping[str, Any]) -> str:
    """Tokens a pass at the accuracy that is asked for: models by ways of decoding."""
    body = []
    for model, label in MODELS.items():
        seeds = evaluated(shown, "base", model)
        if not seeds:
            continue
        row = [label]
        for decoder in DECODERS:
            shown_values = []
            for count in COUNTS:
                values = [best(seed, (model, (decoder,)), count) for seed in seeds]
                reached = [value for value in values if not math.isnan(value)]
                missing = len(values) - len(reached)
                text = str(mean_of(reached)) if reached else "not reached"
                shown_values.append(text + (f" ({missing} not)" if missing and reached else ""))
            row.append(" / ".join(dict.fromkeys(shown_values)))
        body.append(row)
    if not body:
        return ABSENT
    note = " / ".join(COUNTS.values())
    return (
        f"{caption(shown, 'eval_base')}; {shown['setting']['size']['problems']:,} problems a point. Tokens a pass "
        f"({note}) at a strict accuracy within one point of the base model's at threshold 0.95; ± is a standard error "
        "over seeds.\n\n" + markdown(["trained", *DECODERS.values()], body)
    )


def curves(shown: Mapping[str, Any]) -> str:
    """Strict accuracy and tokens a pass at every threshold, means over seeds."""
    seeds = evaluated(shown, "base")
    if not seeds:
        return ABSENT
    thresholds = shown["setting"]["size"]["thresholds"]
    body = []
    for model, label in MODELS.items():
        having = evaluated(shown, model)
        for decoder, way in DECODERS.items() if having else ():
            points = [[seed[f"eval_{model}"]["curves"][decoder][i] for seed in having] for i in range(len(thresholds))]
            body.append(
                [
                    label,
                    way,
                    *(
                        f"{100 * statistics.fmean(p['strict']['mean'] for p in point):.1f} at "
                        f"{statistics.fmean(p['tokens_per_pass']['mean'] for p in point):.2f}"
                        for point in points
                    ),
                ]
            )
    count = shown["setting"]["size"]["problems"] * len(seeds)
    error = 100 * math.sqrt(0.9 * 0.1 / count)
    return (
        "![Strict accuracy over tokens a pass](../benchmarks/results/learning-curves.svg)\n\n"
        f"{caption(shown, 'eval_base')}. Strict accuracy in % at tokens a decoding pass, by threshold; the standard "
        f"error of a mean accuracy of 90 % is {error:.2f} points.\n\n"
        + markdown(["trained", "decoded", *(f"{threshold:g}" for threshold in thresholds)], body)
    )


def training(shown: Mapping[str, Any]) -> str:
    """The base model, its own answers, and how the wordings of each model's answers are spread."""
    seeds = seeds_with(shown, "base", "answers")
    if not seeds:
        return ABSENT
    size = shown["setting"]["size"]
    base = [seed["base"] for seed in seeds]
    texts = statistics.fmean(sum(r["steps"] for r in found["rounds"]) for found in base) * size["batch_size"]
    lines = [
        ["parameters", f"{base[0]['parameters'] / 1e6:.2f} M"],
        ["texts it was trained on, mean over seeds", f"{texts / 1e6:.2f} M"],
        ["rounds, by seed", ", ".join(str(len(found["rounds"])) for found in base)],
        ["last loss, nats, by seed", ", ".join(f"{found['rounds'][-1]['losses'][-1]:.3f}" for found in base)],
        ["strict accuracy at threshold 0.95", percent([found["careful"]["strict"]["mean"] for found in base])],
        ["the same, result only", percent([found["careful"]["final"]["mean"] for found in base])],
        ["its own answers: strictly right", percent([seed["answers"]["strict"]["mean"] for seed in seeds])],
        ["its own answers: finished", percent([seed["answers"]["finished"] for seed in seeds])],
    ]
    for model, label in MODELS.items():
        having = evaluated(shown, model)
        if having:
            nats = mean_of([seed[f"eval_{model}"]["wording"]["nats"] for seed in having])
            lines.append([f"entropy of the wording of answers: {label}", f"{nats} nats"])
    most = seeds[0]["answers"]["wording"]["most"]
    return (
        f"{caption(shown, 'base')}.\n\n"
        + markdown(["base model", ""], lines)
        + f"\nWordings are drawn evenly in the training data, {most:.2f} nats.\n"
    )


def percent(values: Sequence[float]) -> str:
    return f"{mean_of([100 * value for value in values])} %"


def scheduling(shown: Mapping[str, Any]) -> str:
    """A light model at some of the steps: what it costs, carefully decoded and in parallel."""
    seeds = seeds_with(shown, "scheduling")
    if not seeds:
        return ABSENT
    rows = [seed["scheduling"]["rows"] for seed in seeds]
    labels = list(dict.fromkeys(row["label"] for row in rows[0]))
    thresholds = list(dict.fromkeys(row["threshold"] for row in rows[0]))
    body = []
    for label in labels:
        line = [label]
        for threshold in thresholds:
            having = [next(r for r in found if (r["label"], r["threshold"]) == (label, threshold)) for found in rows]
            right = statistics.fmean(row["strict"]["mean"] for row in having)
            heavy = statistics.fmean(row["passes_by_model"].get("H", 0.0) for row in having)
            light = statistics.fmean(row["passes_by_model"].get("L", 0.0) for row in having)
            line.append(f"{100 * right:.1f} ({heavy:.1f} + {light:.1f})")
        body.append(line)
    lost = []
    for threshold in thresholds:
        gaps = []
        for found in rows:
            by = {row["label"]: row["strict"]["mean"] for row in found if row["threshold"] == threshold}
            gaps.append(100 * (by["all heavy"] - by["light first"]))
        lost.append(f"{mean_of(gaps)} at {threshold:g}")
    blocks = seeds[0]["scheduling"]["blocks"]
    return (
        f"{caption(shown, 'scheduling')}; {blocks['H']} and {blocks['L']} blocks, threshold decoding without cache. "
        "Strict accuracy in % (heavy + light passes), by threshold.\n\n"
        + markdown(["schedule", *(f"{threshold:g}" for threshold in thresholds)], body)
        + f"\nPoints of strict accuracy lost by a quarter of light steps at the beginning: {', '.join(lost)}.\n"
    )


def supervised(shown: Mapping[str, Any]) -> str:
    """Fine-tuning on GSM8K's format."""
    seeds = seeds_with(shown, "gsm")
    if not seeds:
        return ABSENT
    found = seeds[0]["gsm"]
    names = list(found["rows"])
    body = []
    for place in range(10):
        low, high = found["rows"]["before"]["by_t"][place]["t"]
        values = [[seed["gsm"]["rows"][name]["by_t"][place]["cross_entropy"] for seed in seeds] for name in names]
        body.append([f"t in {low:g}–{high:g}", *map(nats, values)])
    for kind in ("text", "end of text", "padding"):
        values = [[seed["gsm"]["rows"][name]["by_kind"][kind] for seed in seeds] for name in names]
        body.append([f"**{kind}**", *map(nats, values)])
    for place, ending in enumerate(found["rows"]["before"]["endings"]):
        having = [[seed["gsm"]["rows"][name]["endings"][place] for seed in seeds] for name in names]
        ends = [percent([entry["ended"]["mean"] for entry in row]) for row in having]
        body.append([f"written in {ending['length']} columns: ended", *ends])
        long = [str(mean_of([entry["tokens"]["mean"] for entry in row])) for row in having]
        body.append([f"the same: tokens (true answers: {ending['true_tokens']:.1f})", *long])
    return (
        "![Held-out loss by masking rate](../benchmarks/results/learning-gsm.svg)\n\n"
        f"{caption(shown, 'gsm')}; the shipped heavy model, {found['pairs']:,} pairs, {found['steps']:,} steps of "
        f"{shown['setting']['size']['gsm_batch']}. Held-out cross-entropy of a masked response token, nats; and "
        "answers at temperature 0.\n\n" + markdown(["", *names], body)
    )


def nats(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return str(mean_of(known)) if known else "–"


def drawn(table: Callable[[Mapping[str, Any]], str]) -> Callable[[], str]:
    def draw() -> str:
        shown = content()
        return ABSENT if shown is None else table(shown)

    return draw


TABLES: dict[str, Callable[[], str]] = {
    f"learning-{table.__name__}": drawn(table)
    for table in (headline, parts, cells, curves, training, scheduling, supervised)
}
