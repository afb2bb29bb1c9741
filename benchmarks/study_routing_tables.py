"""The table of docs/study.md about routing, drawn from ``benchmarks/results/study-*.json``."""

from __future__ import annotations

from benchmarks.kernel_tables import markdown
from benchmarks.study_shown import Shown, difference, listed, score, sure

ROUTER = "router"


def routing(shown: Shown) -> str:
    found = shown.found
    fixed = [name for name in found["bands"][0]["points"] if name != ROUTER]
    rows, verdicts = [], []
    for band in found["bands"]:
        points = band["points"]
        ours = points[ROUTER]
        best = min(fixed, key=lambda name: points[name]["score"]["mean"])
        rows.append(
            [
                f"{band['lower']:.2f}–{band['upper']:.2f}",
                *(f"{100 * points[name]['heavy_share']:.1f} %" for name in (ROUTER, fixed[0])),
                score(ours["score"]),
                *(difference(ours["over"][name]) for name in ("all heavy", *fixed)),
            ]
        )
        gap = ours["over"][best]
        word = "cannot be told from" if not sure(gap) else "is better than" if gap["mean"] < 0 else "is worse than"
        quantiles = listed(f"{100 * value:g} %" for value in band["quantiles"])
        verdicts.append(f"- quantiles {quantiles}: the router {word} the best fixed one, {best} ({difference(gap)}).\n")
    caption = (
        f"{shown.environment['device']}, torch {shown.environment['torch']}; the shipped pair; "
        f"{found['num_samples']:,} samples a point, L = T = {found['length']}. Judge, nats a token, with 95 % "
        "intervals, and the router over the others; below 0 the router is better.\n\n"
    )
    header = [
        "entropy, nats",
        "heavy passes, router",
        "fixed",
        "router",
        "over all heavy",
        *(f"over {f}" for f in fixed),
    ]
    return caption + markdown(header, rows) + "\n" + "".join(verdicts)
