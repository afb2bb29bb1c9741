"""Draw the figures of docs/study.md from ``benchmarks/results/study-*.json``: ``python -m benchmarks.study_figures``.

Each SVG holds the digest of what it is drawn from, so that a test can tell whether it is that of the results. One
colour for a thing in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Patch

from benchmarks.harness import RESULTS
from benchmarks.paper_tables import PAPER_CLOCK, PAPER_FLOPS
from benchmarks.study_shown import FITTED, REFERENCE, Shown, margin, part
from benchmarks.study_tables import OF_OTHERS, PAPER_SHARES
from mdkern.digest import digest
from training.options import command_parser

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAVY, LIGHT, PAPER, GREY = "#1f4e79", "#f2a541", "#b03a2e", "#7a7a7a"
MODELS = [Patch(color=HEAVY, label="heavy"), Patch(color=LIGHT, label="light")]
MARKS = "osD^v"  # of ratios
MEASURE_COLOURS = {
    "loss": "#5b8c5a",
    "kl": "#4aa3a2",
    "path_kl": "#6a51a3",
    "masked_kl": "#c194d6",
    "influence": LIGHT,
    "best of the search": GREY,
}


def errors(values: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Means, and half of their 95 % intervals."""
    return [value["mean"] for value in values], [margin(value) for value in values]


def bar_of(axis: Axes, models: str | Sequence[str], row: float, height: float = 0.7) -> None:
    """A schedule as a bar of its models."""
    width = 1 / len(models)
    for index, model in enumerate(models):
        axis.barh(row, width, height, left=index * width, color=HEAVY if model == "H" else LIGHT, linewidth=0)


def hand_made(figure: Figure, shown: Shown) -> None:
    """Schedules as bars, and beside them what each costs at each ratio."""
    rows = shown.found["rows"]
    labels = [label for label in rows[0]["points"] if label != REFERENCE]
    labels.sort(key=lambda label: rows[-1]["points"][label]["score"]["mean"], reverse=True)
    figure.set_size_inches(9, 3.6)
    bars, axis = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    for place, label in enumerate(labels):
        parts = [(part[0], int(part[1:]) // 125) for part in label.split()]
        bar_of(bars, "".join(model * count for model, count in parts), place)
    bars.set_yticks(range(len(labels)), labels)
    bars.set_xlabel("share of the steps done")
    for number, row in enumerate(rows):
        means, margins = errors([row["points"][label]["over"][REFERENCE] for label in labels])
        shift = (number - (len(rows) - 1) / 2) * 0.2
        at = [place + shift for place in range(len(labels))]
        axis.errorbar(
            means, at, xerr=margins, fmt=MARKS[number], color=str(0.25 * number), label=f"T/L = {row['ratio']:g}"
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("judge, nats a token over all heavy")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(
        handles=[*MODELS, *axis.get_legend_handles_labels()[0]], loc="outside lower center", ncols=5, frameon=False
    )


def shares(figure: Figure, shown: Shown) -> None:
    points = list(shown.found["points"].values())
    share = [10 * index for index in range(len(points))]
    figure.set_size_inches(9, 3.8)
    rise, saved = figure.subplots(1, 2)
    over = [point["over"]["0%"] for point in points]
    means, margins = errors(over)
    scale = [100 * math.exp(mean) for mean in means]
    rise.errorbar(
        share,
        [100 * math.expm1(mean) for mean in means],
        yerr=[a * b for a, b in zip(scale, margins)],
        fmt="-o",
        color=HEAVY,
        label="here",
    )
    rise.plot(
        share, [100 * (value / PAPER_SHARES[0] - 1) for value in PAPER_SHARES], "-s", color=PAPER, label="the paper"
    )
    rise.set_ylabel("generative perplexity, rise in %")
    for key, style in (("flops_saved", "--"), ("clock_saved", "-o")):
        name = "FLOPs" if key == "flops_saved" else "wall-clock"
        saved.plot(share, [100 * point[key] for point in points], style, color=HEAVY, label=f"here, {name}")
    saved.plot(share, PAPER_FLOPS, "--", color=PAPER, label="the paper, FLOPs")
    saved.plot(share, PAPER_CLOCK, "-s", color=PAPER, label="the paper, wall-clock")
    saved.set_ylabel("saved, %")
    for axis in (rise, saved):
        axis.set_xlabel("light steps, %")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)


def search(figure: Figure, shown: Shown) -> None:
    """The best and worst five, how often segments are light among the best and worst tenth, and influence."""
    found = shown.found
    ranked = found["ranked"]
    count = min(5, len(ranked) // 2)
    figure.set_size_inches(12, 3.8)
    bars, often, axis = figure.subplots(1, 3)
    chosen = [*ranked[:count], *ranked[-count:]]
    for place, entry in enumerate(chosen):
        bar_of(bars, entry["models"], -place - (0.6 if place >= count else 0))
    ticks = [-place - (0.6 if place >= count else 0) for place in range(len(chosen))]
    bars.set_yticks(ticks, [f"{entry['score']['mean']:.3f}" for entry in chosen])
    bars.set_ylabel(f"judge: best {count}, worst {count}")
    bars.set_xlabel("share of the steps done")
    values = found["influence"]["L"]
    segment = list(range(1, len(values) + 1))
    often.bar([s - 0.2 for s in segment], found["frequency_best_tenth"], 0.4, color=LIGHT, label="best tenth")
    often.bar([s + 0.2 for s in segment], found["frequency_worst_tenth"], 0.4, color=GREY, label="worst tenth")
    often.set_ylabel("share with the segment light")
    often.set_ylim(0, 1.25)
    often.legend(frameon=False, ncols=2, loc="upper center")
    figure.legend(handles=MODELS, loc="outside lower left", ncols=2, frameon=False)
    means, margins = errors(values)
    axis.bar(segment, means, yerr=margins, color=LIGHT, capsize=3)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("influence of a light segment, nats a token")
    for place in (often, axis):
        place.set_xticks(segment)
        place.set_xlabel("segment, in the order of sampling")


def measures(figure: Figure, shown: Shown) -> None:
    found = shown.found
    figure.set_size_inches(12, 3.6)
    loss, kl, path = figure.subplots(1, 3)
    times = found["times"]
    line(loss, times, found["loss"], MEASURE_COLOURS["loss"], "|light − heavy|")
    loss.set_ylabel("loss difference, nats a masked token")
    line(kl, times, found["kl"], MEASURE_COLOURS["kl"], "KL(heavy ‖ light)")
    if found["baseline_kl"]:
        line(kl, times, found["baseline_kl"], HEAVY, "KL(heavy ‖ another heavy)")
        left = [value["mean"] - base["mean"] for value, base in zip(found["kl"], found["baseline_kl"])]
        kl.plot(times, left, "--", color="black", label="their difference (eq. 7)")
    half = (times[0] - times[1]) / 2  # what is masked is told of the beginning of each segment
    at = [t + half for t in times]
    line(kl, at, found["masked_kl"], MEASURE_COLOURS["masked_kl"], "KL(heavy ‖ light) along samples")
    kl.set_ylabel("KL, nats a masked token")
    line(path, times, found["path_kl"], MEASURE_COLOURS["path_kl"], "KL(heavy ‖ light) of what is revealed")
    path.set_ylabel("path KL, nats a text and segment")
    for axis in (loss, kl, path):
        axis.set_xlabel("t, the share masked: sampling runs from 1 to 0")
        axis.set_xlim(1, 0)
        axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="upper left")


def line(axis: Axes, at: Sequence[float], values: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    """Means with the band of their 95 % intervals."""
    means, margins = errors(values)
    axis.plot(at, means, "-o", markersize=3, color=colour, label=label)
    low, high = ([mean + sign * half for mean, half in zip(means, margins)] for sign in (-1, 1))
    axis.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)


def fitted(figure: Figure, shown: Shown) -> None:
    rows = shown.found["rows"]
    figure.set_size_inches(8, 4.2)
    axis = figure.subplots()
    names = [name for name in FITTED if name != "sandwich" and any(name in row["points"] for row in rows)]
    for number, name in enumerate(names):
        there = [(place, row["points"][name]) for place, row in enumerate(rows) if name in row["points"]]
        means, margins = errors([point["over"]["sandwich"] for _, point in there])
        at = [place + (number - (len(names) - 1) / 2) * 0.12 for place, _ in there]
        axis.errorbar(at, means, yerr=margins, fmt="o", color=MEASURE_COLOURS[name], label=FITTED[name])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [f"{100 * row['light']:.0f} %" for row in rows])
    axis.set_xlabel("light steps")
    axis.set_ylabel("judge, nats a token over the sandwich\n(below 0: better)")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


FIGURES: dict[str, Callable[[Figure, Shown], None]] = {
    draw.__name__: draw for draw in (hand_made, shares, search, measures, fitted)
}


def present() -> Iterator[tuple[str, Callable[[Figure, Shown], None], Shown]]:
    """The figures whose parts have been measured: a name of each, how it is drawn, and from what."""
    for text in ("", *OF_OTHERS):
        for name, draw in FIGURES.items():
            shown = part(name, text) if not text or name in OF_OTHERS[text] else None
            if shown is not None:
                yield f"{text}{name}", draw, shown


def draw_all(folder: Path = RESULTS) -> list[Path]:
    """Draw the figures whose parts have been measured."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn = []
    for name, draw, shown in present():
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same names of clip paths in each run
            figure = Figure(layout="constrained")
            draw(figure, shown)
            path = folder / shown.figure
            figure.savefig(path, metadata={"Date": None, "Description": source_of(shown)})
        drawn.append(path)
    return drawn


def source_of(shown: Shown) -> str:
    """What an SVG says of the numbers that it is drawn from."""
    return f"drawn from results {digest(shown.found)[:16]}"


if __name__ == "__main__":
    command_parser("benchmarks.study_figures", __doc__).parse_args()
    for path in draw_all():
        print(path)
