"""Draw the figures of docs/learning.md from its results: ``python -m benchmarks.learning_figures``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import learning_tables
from benchmarks.harness import RESULTS
from benchmarks.learning_tables import DECODERS, MARGIN, MODELS, evaluated, mean_of, seeds_with, target
from mdkern.digest import digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"threshold": "#1f4e79", "run": "#4aa3a2", "revision": "#f2a541", "soft": "#b03a2e"}
LINES = ("#7a7a7a", "#1f4e79", "#f2a541")


def curves(figure: Figure, shown: Mapping[str, Any]) -> None:
    """A panel a model: strict accuracy over tokens a pass, mean over seeds with the seeds' standard errors."""
    there = [model for model in MODELS if evaluated(shown, model)]
    figure.set_size_inches(3.1 * len(there), 3.6)
    panels = figure.subplots(1, len(there), sharey=True, sharex=True, squeeze=False)[0]
    asked = mean_of([target(seed) for seed in evaluated(shown, "base")]).mean
    for axis, model in zip(panels, there):
        seeds = evaluated(shown, model)
        for decoder, label in DECODERS.items():
            found = [seed[f"eval_{model}"]["curves"][decoder] for seed in seeds]
            points = list(zip(*found, strict=True))
            right = [mean_of([100 * point["strict"]["mean"] for point in row]) for row in points]
            speed = [statistics.fmean(point["tokens_per_pass"]["mean"] for point in row) for row in points]
            axis.errorbar(
                speed,
                [value.mean for value in right],
                yerr=[value.error if value.seeds > 1 else 0.0 for value in right],
                fmt="-o",
                markersize=3,
                color=COLOURS[decoder],
                label=label,
            )
        axis.axhline(100 * asked, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(MODELS[model], fontsize=9)
        axis.set_xlabel("tokens a decoding pass")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("strict accuracy, %")
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


FIGURES: dict[str, tuple[str, Callable[[Figure, Mapping[str, Any]], None]]] = {
    "curves": ("eval_base", curves),
    "gsm": ("gsm", gsm),
}


def draw_all(folder: Path = RESULTS) -> list[Path]:
    """Draw the figures whose parts have been measured."""
    import matplotlib
    from matplotlib.figure import Figure

    shown, drawn = learning_tables.content(), []
    for name, (part, draw) in FIGURES.items():
        if shown is None or not seeds_with(shown, part):
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
    for path in draw_all():
        print(path)
