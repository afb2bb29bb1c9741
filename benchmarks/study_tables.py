"""Tables and verdicts of docs/study.md, drawn from ``benchmarks/results/study-*.json`` through `benchmarks.report`.

A verdict is a sentence made of the numbers: it says what they say, whichever way they fall. A part that has not been
measured has one line that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

from benchmarks.kernel_tables import markdown
from benchmarks.paper_tables import PAPER_CLOCK, PAPER_FLOPS
from benchmarks.study_fitted_tables import fitted, measures, prediction, search, three_models
from benchmarks.study_likelihood_tables import bounds, order, yardstick
from benchmarks.study_routing_tables import routing
from benchmarks.study_shown import (
    EDGES,
    MIDDLE,
    REFERENCE,
    SANDWICH,
    WIDE,
    WIKIPEDIA,
    Shown,
    difference,
    listed,
    margin,
    part,
    picture,
    rise,
    score,
    sure,
    unpaired,
)

# Sedykh et al., 2604.02340: generative perplexity (GPT-2's) by % of light steps, and by blocks of the light model.
PAPER_SHARES = (42.9, 43.1, 43.8, 44.7, 45.9, 47.2, 48.6, 50.1, 51.4, 52.5, 53.4)
PAPER_SIZES = {4: 3.41, 6: 1.94, 8: 1.40, 10: 0.12}  # per cent that perplexity rises, 25 % light in a sandwich
ABSENT = "Not measured yet.\n"
REPETITIVE = 1.0  # nats of token entropy less than the ancestral sampler's: repetition that a judge likes


def hand_made(shown: Shown) -> str:
    rows = shown.found["rows"]
    header = ["schedule, of 1,000"]
    for row in rows:
        header += [f"T/L = {row['ratio']:g} (T = {row['steps']})", "over all heavy"]
    body = []
    for label in rows[0]["points"]:
        line = [f"`{label}`"]
        for row in rows:
            point = row["points"][label]
            line += [score(point["score"]), "–" if label == REFERENCE else difference(point["over"][REFERENCE])]
        body.append(line)
    caption = (
        f"{shown.caption}; {rows[0]['num_samples']:,} samples a point. Judge, nats a token, with 95 % intervals.\n\n"
    )
    title = "Judge's nats a token over all heavy, by schedule and ratio of steps to tokens"
    verdicts = "".join(f"- T/L = {row['ratio']:g}: {order_verdict(row['points'])}\n" for row in rows)
    return picture(shown, title) + caption + markdown(header, body) + "\n" + verdicts + beside_narrow(shown)


def beside_narrow(shown: Shown) -> str:
    """Of the wider models: whether the pattern of the narrow ones has grown or faded, at as many steps as tokens."""
    narrow = part("hand_made") if shown.text == WIDE else None
    if narrow is None:
        return ""
    wide_points, points = (
        next(row["points"] for row in found["rows"] if row["ratio"] == 1.0) for found in (shown.found, narrow.found)
    )
    body = []
    for label in quarters_in_order():
        over = [
            (of[label]["over"][REFERENCE]["mean"], of["L1000"]["over"][REFERENCE]["mean"])
            for of in (wide_points, points)
        ]
        body.append([f"`{label}`", *(f"{few / whole:.0%}" for few, whole in over)])
    gap = unpaired(wide_points[MIDDLE[1]]["over"][SANDWICH], points[MIDDLE[1]]["over"][SANDWICH])
    said = ("grows" if gap["mean"] > 0 else "fades") if sure(gap) else "cannot be told to grow or to fade"
    return (
        "\nOf what light steps alone lose, a quarter of them loses:\n\n"
        + markdown(["schedule, T/L = 1", "these models", "the narrow ones"], body)
        + f"\nWith the width the pattern {said}: by what a light third quarter costs more than the sandwich it is "
        f"{difference(gap)} nats a token more.\n"
    )


def quarters_in_order() -> list[str]:
    """The paper's schedules with a quarter of light steps."""
    return [SANDWICH, *EDGES, *MIDDLE]


def order_verdict(points: Mapping[str, Any]) -> str:
    """Whether the sandwich is best and the middle quarters are worst, as in the paper.

    A light middle quarter and one at an edge are compared as if what each loses to all heavy were independent, which
    makes it less sure than pairs would.
    """
    quarters = quarters_in_order()
    mean = {label: points[label]["score"]["mean"] for label in quarters}
    best = min(quarters, key=mean.__getitem__)
    rival = min((label for label in quarters if label != SANDWICH), key=mean.__getitem__)
    gap = points[rival]["over"][SANDWICH]
    if not sure(gap):
        first = (
            f"the sandwich and `{rival}` cannot be told apart ({difference(gap)}); in the paper the sandwich is best"
        )
    elif best == SANDWICH:
        first = f"same as the paper, the sandwich is best, `{rival}` next ({difference(gap)})"
    else:
        first = f"different from the paper, `{best}` is better than the sandwich ({difference(gap)})"
    middle, edge = min(MIDDLE, key=mean.__getitem__), max(EDGES, key=mean.__getitem__)
    gap = unpaired(points[middle]["over"][REFERENCE], points[edge]["over"][REFERENCE])
    if not sure(gap):
        return (
            f"{first}; `{middle}` cannot be told from `{edge}` ({difference(gap)}); in the paper the middle quarters "
            "are worst."
        )
    if gap["mean"] > 0:
        return f"{first}; same as the paper, the middle quarters are worst."
    worst = sorted(quarters, key=mean.__getitem__)[-2:]
    return f"{first}; different from the paper, the worst two are {listed(f'`{label}`' for label in worst)}."


def shares(shown: Shown) -> str:
    points = shown.found["points"]
    rows = [
        ["judge, nats a token", *(f"{point['score']['mean']:.3f}" for point in points.values())],
        ["**perplexity, rise in %**", *(rise(point["over"]["0%"]) for point in points.values())],
        ["the paper: rise in %", *(f"{100 * (value / PAPER_SHARES[0] - 1):+.1f}" for value in PAPER_SHARES)],
        ["FLOPs saved, counted, %", *(f"{100 * point['flops_saved']:.1f}" for point in points.values())],
        ["**wall-clock saved, %**", *(f"{100 * point['clock_saved']:.1f}" for point in points.values())],
        ["the paper: FLOPs saved, %", *(f"{value:.1f}" for value in PAPER_FLOPS)],
        ["the paper: wall-clock saved, %", *(f"{value:.1f}" for value in PAPER_CLOCK)],
    ]
    widest = max(margin(point["over"]["0%"]) for point in points.values())
    apart = max(100 * abs(point["clock_saved"] - point["flops_saved"]) for point in points.values())
    caption = (
        f"{shown.caption}; {shown.found['num_samples']:,} samples a point, T = {shown.found['steps']}; the clock is of "
        f"{shown.found['batch_size']} samples, median of {len(points['0%']['seconds'])}.\n\n"
    )
    half, whole = (points[label]["over"]["0%"]["mean"] for label in ("50%", "100%"))
    paper_half = math.log(PAPER_SHARES[5] / PAPER_SHARES[0]) / math.log(PAPER_SHARES[-1] / PAPER_SHARES[0])
    verdict = (
        f"\nDifferences from no light step are known to ± {widest:.4f} nats a token or better. At half of the steps "
        f"{half / whole:.0%} of what all light costs is lost (the paper: {paper_half:.0%}). Clock and counted FLOPs "
        f"are at most {apart:.1f} points apart.\n"
    )
    title = "Perplexity's rise and wall-clock saved over the share of light steps, beside the paper's"
    return picture(shown, title) + caption + markdown(["light steps", *points], rows) + verdict


def light_size(shown: Shown) -> str:
    found = shown.found
    whole = found["points"]["all heavy"]
    rows = [["none", score(whole["score"]), "–", "–", "–", "–", f"{whole['token_entropy']['mean']:.3f}"]]
    for name, blocks in sorted(found["blocks"].items(), key=lambda item: item[1]):
        point = found["points"][name]
        rows.append(
            [
                f"{blocks}",
                score(point["score"]),
                difference(point["over"]["all heavy"]),
                rise(point["over"]["all heavy"]),
                f"{PAPER_SIZES[blocks]:+.1f}" if blocks in PAPER_SIZES else "–",
                f"{100 * point['flops_saved']:.1f}",
                f"{point['token_entropy']['mean']:.3f}",
            ]
        )
    header = [
        "light blocks",
        "judge, nats a token",
        "over all heavy",
        "perplexity, rise in %",
        "the paper's",
        "FLOPs saved, %",
        "token entropy, nats",
    ]
    widest = max(margin(point["token_entropy"]) for point in found["points"].values())
    caption = (
        f"{shown.caption}; {found['num_samples']:,} samples a point, T = {found['steps']}; a quarter light, "
        f"sandwich. Entropy of a sample's tokens ± {widest:.3f}.\n\n"
    )
    return caption + markdown(header, rows) + "\n" + size_verdict(found)


def size_verdict(found: Mapping[str, Any]) -> str:
    """Whether less is lost the deeper the light model is, as in the paper, as far as neighbours can be told apart.

    Gaps between two light models are taken as if their samples were independent, which makes them less sure than pairs
    would.
    """
    loss = {found["blocks"][name]: found["points"][name]["over"]["all heavy"] for name in found["blocks"]}
    depths = sorted(loss)
    gaps = {pair: unpaired(loss[pair[1]], loss[pair[0]]) for pair in [*pairwise(depths), (depths[0], depths[-1])]}
    said = [f"from {few} to {many} blocks {difference(gap)}" for (few, many), gap in gaps.items()]
    if any(sure(gap) and gap["mean"] > 0 for gap in gaps.values()):
        verdict = "Different from the paper: a deeper light model loses more"
    elif all(sure(gap) for gap in gaps.values()):
        verdict = "Same as the paper: the deeper the light model, the less is lost"
    elif sure(gaps[depths[0], depths[-1]]):
        verdict = "As in the paper the deepest loses less than the shallowest, but not all neighbours can be told apart"
    else:
        verdict = "The light models cannot be told apart; in the paper the deeper one always loses less"
    return f"{verdict}: {'; '.join(said)} nats a token.\n"


def decoders(shown: Shown) -> str:
    rows, verdicts = [], []
    usual = min(entropies(shown.found["decoders"]["ancestral"]))
    for name, points in shown.found["decoders"].items():
        least, most = min(entropies(points)), max(entropies(points))
        line = [name, score(points["all heavy"]["score"])]
        line += [difference(point["over"]["all heavy"]) for label, point in points.items() if label != "all heavy"]
        rows.append([*line, f"{least:.2f}–{most:.2f}", f"{sum(points['all heavy']['passes'].values()):.0f}"])
        quarters = [label for label in points if label.startswith("25 %")]
        best = min(quarters, key=lambda label: points[label]["score"]["mean"])
        gap = points[best]["over"]["25 % sandwich"]
        if least < usual - REPETITIVE:
            verdicts.append(f"{name}: its texts repeat themselves, so that a lower score is no better text")
        elif best != "25 % sandwich" and sure(gap):
            verdicts.append(f"{name}: {best} is better than the sandwich ({difference(gap)})")
        else:
            others = {label: points[label]["over"]["25 % sandwich"] for label in quarters if label != "25 % sandwich"}
            alike = [f"{label} ({difference(value)})" for label, value in others.items() if not sure(value)]
            known = f"not to be told from {' and '.join(alike)}" if alike else "the best"
            verdicts.append(f"{name}: the sandwich is {known}")
    labels = [label for label in next(iter(shown.found["decoders"].values())) if label != "all heavy"]
    caption = (
        f"{shown.caption}; {shown.found['num_samples']:,} samples a point, temperature 1. Judge, nats a token, and "
        "over all heavy; entropy of a sample's tokens, nats.\n\n"
    )
    header = ["decoder", "all heavy", *labels, "token entropy", "passes, all heavy"]
    return caption + markdown(header, rows) + "\n" + "; ".join(verdicts) + ".\n"


def entropies(points: dict[str, Any]) -> list[float]:
    return [point["token_entropy"]["mean"] for point in points.values()]


def prompted(shown: Shown) -> str:
    found = shown.found
    rows = [
        [f"`{label}`", score(point["score"]), "–" if label == REFERENCE else difference(point["over"][REFERENCE])]
        for label, point in found["points"].items()
    ]
    caption = (
        f"{shown.caption}; {found['num_samples']:,} windows of held-out text, {found['given']} tokens given, T = "
        f"{found['steps']}. Judge, nats a token that was written.\n\n"
    )
    return (
        caption
        + markdown(["schedule, of 1,000", "judge", "over all heavy"], rows)
        + f"\n{capital(order_verdict(found['points']))}\n"
    )


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def drawn(name: str, draw: Callable[[Shown], str], text: str = "") -> str:
    shown = part(name, text)
    return ABSENT if shown is None else draw(shown)


PARTS: dict[str, Callable[[Shown], str]] = {
    draw.__name__: draw
    for draw in (
        hand_made,
        shares,
        light_size,
        search,
        measures,
        prediction,
        fitted,
        three_models,
        decoders,
        routing,
        prompted,
        yardstick,
        order,
        bounds,
    )
}
OF_OTHERS = {  # what is shown of other models than the shipped ones and their family
    WIKIPEDIA: ("hand_made", "search", "measures", "prediction", "fitted", "yardstick", "bounds"),
    WIDE: ("hand_made", "bounds"),
}
TABLES: dict[str, Callable[[], str]] = {
    "-".join(("study", *filter(None, [text]), name.replace("_", "-"))): partial(drawn, name, PARTS[name], text)
    for text, names in {"": tuple(PARTS), **OF_OTHERS}.items()
    for name in names
}
