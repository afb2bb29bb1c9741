"""Tables of docs/study.md about likelihoods of held-out text, drawn from ``benchmarks/results/study-*.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.kernel_tables import markdown
from benchmarks.study_shown import FAMILY, REFERENCE, Shown, difference, read, score

# The model card's held-out NELBO of the shipped models and its standard error, by blocks.
CARD = {4: (3.936, 0.010), 12: (3.753, 0.010)}


def yardstick(shown: Shown) -> str:
    found = shown.found
    rows = [
        [
            f"`{label}`",
            score(point["bound"]),
            difference(point["over"][REFERENCE]) if label != REFERENCE else "–",
            score(point["judge"]),
        ]
        for label, point in found["points"].items()
    ]
    caption = (
        f"{shown.caption}; {found['windows']} windows of held-out text, {found['masks']} masks each. Nats a token.\n\n"
    )
    verdict = f"\nRank correlation of the two over the {len(rows)} schedules: {found['rank_correlation']:+.2f}.\n"
    header = ["schedule, of 1,000", "any-order bound of held-out text", "over all heavy", "judge's score of samples"]
    return caption + markdown(header, rows) + verdict


def order(shown: Shown) -> str:
    found = shown.found
    rows, verdicts = [], []
    for name, points in ({"random": found["any_order"]} | found["decoders"]).items():
        rows.append(
            [
                name,
                score(points["all heavy"]["nats"]),
                *(difference(point["over"]["all heavy"]) for label, point in points.items() if label != "all heavy"),
                f"{sum(points['all heavy']['passes'].values()):.0f}" if name != "random" else "–",
            ]
        )
        verdicts.append(f"{name}: {order_of_quarters(points)}")
    labels = [label for label in found["any_order"] if label != "all heavy"]
    caption = (
        f"{shown.caption}; {found['windows']} windows of held-out text, T = {found['steps']}. -log p, nats a "
        "token, and over all heavy; of random orders the any-order bound.\n\n"
    )
    header = ["order", "all heavy", *labels, "passes"]
    return caption + markdown(header, rows) + "\n" + "; ".join(verdicts) + ".\n"


def order_of_quarters(points: Mapping[str, Any]) -> str:
    """Where a quarter of light steps costs least, and how surely."""
    quarters = [label for label in points if label.startswith("25 %")]
    best = min(quarters, key=lambda label: points[label]["nats"]["mean"])
    gap = points[best]["over"]["25 % sandwich"]
    if best == "25 % sandwich":
        return "the sandwich costs least"
    return f"{best} costs least, {difference(gap)} over the sandwich"


def bounds(shown: Shown) -> str:
    found = shown.found
    ordered = sorted(found["points"].items(), key=lambda item: (item[1]["blocks"], item[0]))
    trained = ends_of_training(shown.text)
    rows = [
        [
            name,
            f"{point['parameters'] / 1e6:.2f}",
            score(point["bound"]),
            "–" if name == found["heavy"] else difference(point["over"][found["heavy"]]),
            trained.get(name, "–"),
        ]
        for name, point in ordered
    ]
    caption = (
        f"{shown.caption}; {found['windows']} windows of held-out text, {found['masks']} masks each, nats a token. The "
        "last column is each training run's own evaluation, on other windows and masks, ± one standard error.\n\n"
    )
    header = [
        "model, by its blocks",
        "parameters, M",
        "any-order bound",
        f"over {found['heavy']}",
        "held-out NELBO after training",
    ]
    return caption + markdown(header, rows) + twice_trained(found)


def twice_trained(found: Mapping[str, Any]) -> str:
    """How far other models as deep as the heavy one are from it, and which depth is as far."""
    heavy, points = found["heavy"], found["points"]
    depth = points[heavy]["blocks"]
    over = {name: point["over"][heavy] for name, point in points.items()}
    shallow = [name for name, point in points.items() if point["blocks"] < depth]
    said = []
    for name in (name for name, point in points.items() if point["blocks"] == depth and name != heavy):
        near = min(shallow, key=lambda other: abs(over[other]["mean"] - over[name]["mean"]))
        said.append(
            f"\n{name}, as deep as {heavy} but with another seed and order of the data, is {difference(over[name])} "
            f"above it. Nearest to that is the model of {points[near]['blocks']} blocks.\n"
        )
    return "".join(said)


def ends_of_training(text: str) -> dict[str, str]:
    """By model, the held-out NELBO of those trained for a text's family, and the card's of the shipped ones."""
    family = read(f"{text or FAMILY}-training")
    known = {} if text else {str(blocks): value for blocks, value in CARD.items()}
    for name, found in ({} if family is None else family["held_out"]).items():
        if "nelbo_nats_per_token" in found:  # a judge has none
            known[name] = found["nelbo_nats_per_token"], found["standard_error"]
    return {name: f"{mean:.3f} ± {error:.3f}" for name, (mean, error) in known.items()}
