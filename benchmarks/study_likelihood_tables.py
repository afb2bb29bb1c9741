"""Tables of docs/study.md about likelihoods of held-out text, drawn from ``benchmarks/results/study-*.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.kernel_tables import markdown
from benchmarks.study_shown import REFERENCE, Shown, difference, score


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
    rows = [
        [
            name,
            f"{point['parameters'] / 1e6:.2f}",
            score(point["bound"]),
            "–" if name == found["heavy"] else difference(point["over"][found["heavy"]]),
        ]
        for name, point in ordered
    ]
    caption = f"{shown.caption}; {found['windows']} windows of held-out text, {found['masks']} masks each.\n\n"
    header = ["model, by its blocks", "parameters, M", "any-order bound, nats a token", f"over {found['heavy']}"]
    return caption + markdown(header, rows)
