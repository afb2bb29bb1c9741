"""Draw the figures of docs/learning.md from its results: ``python -m benchmarks.learning_figures``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import choice_tables, learning_tables
from benchmarks.choice_tables import LEARNED, TASKS
from benchmarks.harness import RESULTS
from benchmarks.learning_equal import MARGIN, over_seeds, target
from benchmarks.learning_tables import DECODERS, MODELS, evaluated, seeds_with
from mdkern.digest import digest
from training.options import command_parser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"threshold": "#1f4e79", "run": "#4aa3a2", "revision": "#f2a541", "soft": "#b03a2e"}
FASTEST_SHOWN = 8  # tokens a pass
LINES = ("#7a7a7a", "#1f4e79", "#f2a541")
RULES = {  # colour and mark: what needs no training is blue, green or grey
    "threshold": ("#1f4e79", "o"),
    "factor": ("#4aa3a2", "x"),
    "entropy bound": ("#5b8c5a", "s"),
    "top probability": ("#7a7a7a", "v"),
    "margin": ("#111111", "^"),
    "linear": ("#f2a541", "o"),
    "mlp": ("#b03a2e", "o"),
    "closed loop": ("#c194d6", "D"),
}
MEASURES = {
    "nats": "judge, nats a written token",
    "entropy": "token entropy, nats",
    "agreement": "agreement",
    "exact_nats": "exact nats of true text",
}
FEWEST_SHOWN = 0.45  # of the most passes; what has fewer is far worse


def curves(figure: Figure, shown: Mapping[str, Any]) -> None:
    """A panel a model: strict accuracy over tokens a pass, with standard errors over seeds, or one seed's problems."""
    there = [model for model in MODELS if evaluated(shown, model)]
    rows, columns = math.ceil(len(there) / 3), min(3, len(there))
    figure.set_size_inches(3.3 * columns, 2.7 * rows + 0.9)
    panels = figure.subplots(rows, columns, sharey=True, sharex=True, squeeze=False).flatten()
    asked = statistics.fmean(target(seed) for seed in evaluated(shown, "base"))
    for axis, model in zip(panels, there):
        seeds = evaluated(shown, model)
        for decoder, label in DECODERS.items():
            found = [seed[f"eval_{model}"]["curves"][decoder] for seed in seeds]
            points = list(zip(*found, strict=True))
            right = [over_seeds([point["strict"] for point in row], 100) for row in points]
            speed = [statistics.fmean(point["tokens_per_pass"]["mean"] for point in row) for row in points]
            axis.errorbar(
                speed,
                [value.mean for value in right],
                yerr=[value.error for value in right],
                fmt="-o",
                markersize=3,
                color=COLOURS[decoder],
                label=label,
            )
        axis.axhline(100 * asked, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(MODELS[model], fontsize=9)
        axis.set_xlabel("tokens a decoding pass")
        axis.grid(alpha=0.3)
    for axis in panels[len(there) :]:
        axis.set_axis_off()
    panels[0].set_xlim(1, FASTEST_SHOWN)  # what is faster is nearly always wrong
    for axis in panels[::columns]:
        axis.set_ylabel("strict accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    note = f"dashed: base model at threshold 0.95 less {100 * MARGIN:g} point"
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, title=note)


def gsm(figure: Figure, shown: Mapping[str, Any]) -> None:
    """Held-out cross-entropy of a masked token over the share that is masked."""
    rows = [seed["gsm"]["rows"] for seed in seeds_with(shown, "gsm")]
    figure.set_size_inches(5, 3.4)
    axis = figure.subplots()
    for name, colour in zip(rows[0], LINES):
        bins = range(len(rows[0][name]["by_t"]))
        values = [[row[name]["by_t"][i]["cross_entropy"] for row in rows] for i in bins]
        known = [(sum(rows[0][name]["by_t"][i]["t"]) / 2, v) for i, v in enumerate(values) if None not in v]
        axis.plot([t for t, _ in known], [statistics.fmean(v) for _, v in known], "-o", color=colour, label=name)
    axis.set_xlabel("t, the share of the response that is masked")
    axis.set_ylabel("nats a masked token, held out")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def choice(figure: Figure, shown: Mapping[str, Any]) -> None:
    """A row a task: each measure over passes, a line a rule; of the first seed, with standard errors over texts."""
    found = next(iter(shown["seeds"].values()))
    tasks = [task for task in TASKS if task in found]
    figure.set_size_inches(12, 2.7 * len(tasks) + 0.9)
    grid = figure.subplots(len(tasks), len(MEASURES), sharex=True, squeeze=False)
    for axes, task in zip(grid, tasks):
        most = max(row["passes"]["mean"] for row in found[task]["rows"])
        rows = [row for row in found[task]["rows"] if row["passes"]["mean"] >= FEWEST_SHOWN * most]
        for (measure, label), axis in zip(MEASURES.items(), axes):
            for name, (colour, mark) in RULES.items():
                points = [row for row in rows if row["rule"] == name]
                axis.errorbar(
                    [row["passes"]["mean"] for row in points],
                    [row[measure]["mean"] for row in points],
                    yerr=[row[measure]["standard_error"] for row in points],
                    fmt=f"-{mark}",
                    markersize=4,
                    linewidth=1.2,
                    color=colour,
                    label=LEARNED.get(name, name),
                )
            axis.set_title(f"{TASKS[task].split(',')[0]}: {label}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in grid[-1]:
        axis.set_xlabel("passes")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


FIGURES: dict[str, tuple[Callable[[], dict[str, Any] | None], Callable[[Figure, Mapping[str, Any]], None]]] = {
    "curves": (partial(learning_tables.content, "eval_base"), curves),
    "gsm": (partial(learning_tables.content, "gsm"), gsm),
    "choice": (choice_tables.content, choice),
}


def draw_all(folder: Path = RESULTS) -> list[Path]:
    """Draw the figures whose parts have been measured."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn = []
    for name, (results, draw) in FIGURES.items():
        shown = results()
        if shown is None:
            continue
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same names of clip paths in each run
            figure = Figure(layout="constrained")
            draw(figure, shown)
            path = folder / f"learning-{name}.svg"
            figure.savefig(path, metadata={"Date": None, "Description": source_of(shown)})
        drawn.append(path)
    return drawn


def source_of(shown: Mapping[str, Any]) -> str:
    """What an SVG says of the numbers that it is drawn from."""
    return f"drawn from results {digest(dict(shown))[:16]}"


if __name__ == "__main__":
    command_parser("benchmarks.learning_figures", __doc__).parse_args()
    for path in draw_all():
        print(path)
