"""Tables and verdicts of docs/learning.md, drawn from ``benchmarks/results/learning-problems.json``.

A verdict is a sentence made of the numbers: it says what they say, whichever way they fall. What has not been measured
has one line that says so. ± is a standard error as `benchmarks.learning_equal` has it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.kernel_tables import markdown
from benchmarks.learning_equal import MARGIN, REFERENCE, Cell, Mean, mean_of, over_seeds, ratio, ratio_of, speed, target

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
TOO_WRONG = 0.5  # a strict accuracy below which losses say little
CLAIM = 1.5  # times, DMax's claim as it is asked here
COUNTS = {"tokens_per_pass": "decoding passes only", "tokens_per_forward": "all passes, commits of the cache too"}


def content(part: str = "") -> dict[str, Any] | None:
    """The results, if they have a part."""
    if not (path := RESULTS / FILE).exists():
        return None
    shown: dict[str, Any] = json.loads(path.read_text())
    return shown if not part or seeds_with(shown, part) else None


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


STEPS: dict[str, tuple[Cell, Cell]] = {  # what the gain is made of: each is what is above over what is below
    "self-distillation": (("masked", RULES), ("base", RULES)),
    "self-distillation with LLaDA's objective": (("supervised", RULES), ("base", RULES)),
    "more training on true answers": (("masked_true", RULES), ("base", RULES)),
    "on-policy training, decoded as before": (("oput", RULES), ("masked", RULES)),
    "revision, of the on-policy model": (("oput", ("revision",)), ("oput", RULES)),
    "soft inputs, over revision": (("oput", ("soft",)), ("oput", ("revision",))),
    "revision, of the masked-only model": (("masked", ("revision",)), ("masked", RULES)),
    "on-policy training, each with its best decoder": (("oput", tuple(DECODERS)), ("masked", tuple(DECODERS))),
    "on-policy instead of uniform noise, best decoder": (("oput", tuple(DECODERS)), ("uniform", tuple(DECODERS))),
}
STRONGEST: tuple[Cell, Cell] = ("oput", ("soft",)), ("supervised", RULES)
WHOLE: tuple[Cell, Cell] = ("oput", ("soft",)), ("masked", RULES)
PUBLISHED: tuple[Cell, Cell] = ("oput", ("soft",)), ("base", ("threshold",))
MARGINS = 0.0, 0.01, 0.02, 0.05, 0.08, 0.1, 0.2, 0.3


def evaluated(shown: Mapping[str, Any], *models: str) -> list[dict[str, Any]]:
    return seeds_with(shown, *(f"eval_{model}" for model in models))


def spread(seeds: Sequence[Any]) -> str:
    """What ± means."""
    if len(seeds) > 1:
        return "± is a standard error over seeds."
    return "One seed: ± is a standard error over its problems, and other seeds may differ by more."


def verdict(found: Mean) -> str:
    """Whether a ratio reaches DMax's, with two standard errors on either side."""
    if math.isnan(found.error):
        return "no standard error"
    if found.mean - 2 * found.error >= CLAIM:
        return "the claim holds beyond two standard errors"
    if found.mean + 2 * found.error < CLAIM:
        return "the claim does not hold, beyond two standard errors"
    return "within two standard errors of the claim: undecided"


def seeds_named(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def headline(shown: Mapping[str, Any]) -> str:
    """DMax's claim at this scale, in a sentence."""
    seeds = evaluated(shown, "base", "masked", "oput")
    if not seeds:
        return ABSENT
    sentences, published = [], []
    for count, label in COUNTS.items():
        found = ratio(seeds, *WHOLE, count)
        if found is None:
            sentences.append(f"counting {label}, one of the two does not reach the accuracy")
        else:
            each = ", ".join(f"{ratio_of(seed, *WHOLE, count):.2f}" for seed in seeds)
            by_seed = f", by seed {each}" if len(seeds) > 1 else ""
            sentences.append(f"{found} × as many tokens a pass counting {label}{by_seed} ({verdict(found)})")
        published.append(str(ratio(seeds, *PUBLISHED, count) or "–"))
    accuracy = 100 * statistics.fmean(target(seed) + MARGIN for seed in seeds)
    return (
        f"> Word problems, {seeds_named(len(seeds))}, strict accuracy within one point of the base model's at "
        f"threshold {REFERENCE[2]} ({accuracy:.1f} %): on-policy training with soft inputs against the masked-only "
        f"control with the best threshold rule has {'; '.join(sentences)}. "
        f"DMax's claim as it is asked here is {CLAIM} ×. "
        "Against the base model with threshold decoding, which is how DMax compares, "
        f"it is {' and '.join(published)} ×. "
        f"{spread(seeds)}\n"
    )


def parts(shown: Mapping[str, Any]) -> str:
    """What the gain is made of."""
    body = []
    for name, (above, below) in {
        **STEPS,
        "**all of it: OPUT + soft over masked only**": WHOLE,
        "**OPUT + soft over LLaDA's objective on the same answers**": STRONGEST,
        "**as DMax compares: OPUT + soft over the base model with threshold decoding**": PUBLISHED,
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


def margins(shown: Mapping[str, Any]) -> str:
    """The claim at other accuracies than the one that was fixed beforehand."""
    seeds = evaluated(shown, "base", "masked", "oput")
    if not seeds:
        return ABSENT
    every = tuple(DECODERS)
    compared = {
        "OPUT + soft over masked only, best threshold rule": WHOLE,
        "OPUT over masked only, each with its best decoder": (("oput", every), ("masked", every)),
    }
    body = []
    for margin in MARGINS:
        asked = 100 * statistics.fmean(target(seed, margin) for seed in seeds)
        cells = [ratio(seeds, *pair, count, margin) for pair in compared.values() for count in COUNTS]
        body.append([f"{100 * margin:g}", f"{asked:.1f} %", *("–" if cell is None else f"{cell} ×" for cell in cells)])
    names = [f"{name}: {label}" for name in compared for label in COUNTS.values()]
    first, (above, below) = next(iter(compared.items()))
    sought = [
        (statistics.fmean(ratio_of(seed, above, below, count, tenth / 1000) for seed in seeds), tenth / 10)
        for count in COUNTS
        for tenth in range(401)
    ]
    largest, at = max((pair for pair in sought if not math.isnan(pair[0])), default=(math.nan, math.nan))
    return markdown(["points below the base model", "strict accuracy", *names], body) + (
        f"\nThe largest ratio of the first kind ({first}) at any accuracy down to 40 points below is {largest:.2f} ×, "
        f"at {at:.1f} points.\n"
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
                found = speed(seeds, (model, (decoder,)), count)
                missing = len(seeds) - found.seeds
                text = str(found) if found.seeds else "not reached"
                shown_values.append(text + (f" ({missing} not)" if missing and found.seeds else ""))
            row.append(" / ".join(dict.fromkeys(shown_values)))
        body.append(row)
    if not body:
        return ABSENT
    note = " / ".join(COUNTS.values())
    return (
        f"{caption(shown, 'eval_base')}; {shown['setting']['size']['problems']:,} problems a point. Tokens a pass "
        f"({note}) at a strict accuracy within one point of the base model's at threshold 0.95. "
        f"{spread(shown['seeds'])}\n\n" + markdown(["trained", *DECODERS.values()], body)
    )


def curves(shown: Mapping[str, Any]) -> str:
    """Strict accuracy and tokens a pass at every threshold."""
    seeds = evaluated(shown, "base")
    if not seeds:
        return ABSENT
    thresholds = shown["setting"]["size"]["thresholds"]
    body, largest = [], 0.0
    for model, label in MODELS.items():
        having = evaluated(shown, model)
        for decoder, way in DECODERS.items() if having else ():
            row = [label, way]
            for place in range(len(thresholds)):
                points = [seed[f"eval_{model}"]["curves"][decoder][place] for seed in having]
                right = over_seeds([point["strict"] for point in points], 100)
                speeds = [over_seeds([point[count] for point in points]) for count in COUNTS]
                largest = max([largest, *(found.error / found.mean for found in speeds if found.mean)])
                row.append(f"{right.text(1)} at {' / '.join(f'{found.mean:.2f}' for found in speeds)}")
            body.append(row)
    return (
        "![Strict accuracy over tokens a pass](../benchmarks/results/learning-curves.svg)\n\n"
        f"{caption(shown, 'eval_base')}. Strict accuracy in % at tokens a pass ({' / '.join(COUNTS.values())}), by "
        f"threshold. {spread(shown['seeds'])} Those of tokens a pass are at most {100 * largest:.1f} % of them.\n\n"
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
        ["texts it was trained on", f"{texts / 1e6:.2f} M"],
        ["rounds, by seed", ", ".join(str(len(found["rounds"])) for found in base)],
        ["last loss, nats, by seed", ", ".join(f"{found['rounds'][-1]['losses'][-1]:.3f}" for found in base)],
        ["strict accuracy at threshold 0.95", percent([found["careful"]["strict"] for found in base])],
        ["the same, result only", percent([found["careful"]["final"] for found in base])],
        ["its own answers: strictly right", percent([seed["answers"]["strict"] for seed in seeds])],
        ["its own answers: finished", f"{mean_of([100 * seed['answers']['finished'] for seed in seeds])} %"],
    ]
    for model, label in MODELS.items():
        having = evaluated(shown, model)
        if having:
            nats = mean_of([seed[f"eval_{model}"]["wording"]["nats"] for seed in having])
            lines.append([f"entropy of the wording of answers: {label}", f"{nats} nats"])
    most = seeds[0]["answers"]["wording"]["most"]
    return (
        f"{caption(shown, 'base')}. {spread(seeds)}\n\n"
        + markdown(["base model", ""], lines)
        + f"\nWordings are drawn evenly in the training data, {most:.2f} nats.\n"
    )


def percent(estimates: Sequence[Mapping[str, Any]]) -> str:
    return f"{over_seeds(estimates, 100)} %"


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
    blocks = seeds[0]["scheduling"]["blocks"]
    return (
        f"{caption(shown, 'scheduling')}; {blocks['H']} and {blocks['L']} blocks, threshold decoding without cache. "
        "Strict accuracy in % (heavy + light passes), by threshold.\n\n"
        + markdown(["schedule", *(f"{threshold:g}" for threshold in thresholds)], body)
        + "\nLight passes over the first quarter of the columns, and what they lose. The gap is what light passes "
        f"alone would lose; below {100 * TOO_WRONG:g} % of strict accuracy there is little left to lose. "
        f"{spread(seeds)}\n\n"
        + markdown(
            ["threshold", "share of light passes", "points lost", "share of the gap"],
            [lost_by_light(rows, threshold) for threshold in thresholds if worth(rows, threshold)],
        )
    )


def worth(rows: Sequence[Any], threshold: float) -> bool:
    """Whether heavy passes alone are right often enough at this threshold."""
    whole = [row for found in rows for row in found if (row["label"], row["threshold"]) == ("all heavy", threshold)]
    return statistics.fmean(row["strict"]["mean"] for row in whole) >= TOO_WRONG


def lost_by_light(rows: Sequence[Any], threshold: float) -> list[str]:
    """Of light passes at the beginning: their share, points of strict accuracy lost, and these over the whole gap."""
    losses, gaps, shares = [], [], []
    for found in rows:
        by = {row["label"]: row for row in found if row["threshold"] == threshold}
        heavy, first, light = (by[label]["strict"] for label in ("all heavy", "light first", "all light"))
        error = math.hypot(heavy["standard_error"], first["standard_error"])
        losses.append({"mean": heavy["mean"] - first["mean"], "standard_error": error})
        gaps.append(heavy["mean"] - light["mean"])
        passes = by["light first"]["passes_by_model"]
        shares.append(passes.get("L", 0.0) / sum(passes.values()))
    lost = over_seeds(losses, 100)
    of_gap = f"{lost.mean / statistics.fmean(gaps):.0f} %" if all(gaps) else "–"
    return [f"{threshold:g}", f"{100 * statistics.fmean(shares):.0f} %", lost.text(1), of_gap]


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
        ends = [percent([entry["ended"] for entry in row]) for row in having]
        body.append([f"written in {ending['length']} columns: ended", *ends])
        long = [str(over_seeds([entry["tokens"] for entry in row])) for row in having]
        body.append([f"the same: tokens (true answers: {ending['true_tokens']:.1f})", *long])
    return (
        "![Held-out loss by masking rate](../benchmarks/results/learning-gsm.svg)\n\n"
        f"{caption(shown, 'gsm')}; the shipped heavy model, {found['pairs']:,} pairs and {found['test']:,} "
        f"held out, {found['steps']:,} steps of "
        f"{shown['setting']['size']['gsm_batch']}. Held-out cross-entropy of a masked response token, "
        f"nats; and {found['rows']['before']['endings'][0]['answers']} answers a line at temperature 0. "
        f"{spread(seeds)}\n\n" + markdown(["", *names], body)
    )


def nats(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return str(mean_of(known)) if known else "–"


def drawn(table: Callable[[Mapping[str, Any]], str]) -> Callable[[], str]:
    def draw() -> str:
        shown = content("gsm" if table is supervised else "base")
        return ABSENT if shown is None else table(shown)

    return draw


TABLES: dict[str, Callable[[], str]] = {
    f"learning-{table.__name__}": drawn(table)
    for table in (headline, parts, margins, cells, curves, training, scheduling, supervised)
}
