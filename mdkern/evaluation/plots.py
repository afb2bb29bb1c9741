"""Pictures of the measures: importance over time, and the search's best and worst schedules. Need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdkern.evaluation.importance import ImportanceAt, PathImportanceAt
from mdkern.evaluation.intervals import NORMAL_95, Estimate
from mdkern.evaluation.search import Found, frequencies, influence, ranked
from mdkern.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAVY_COLOUR, LIGHT_COLOUR, THIRD_COLOUR = "#1f4e79", "#f2a541", "#7a7a7a"


def plot_importance(
    found: Sequence[ImportanceAt], path: Sequence[PathImportanceAt], target: Path, title: str = ""
) -> None:
    """Loss difference, KL and path KL, each with its 95 % interval, over the diffusion time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13 if path else 9, 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if path else 2)
    times = [at.t for at in found]
    band(axes[0], times, [at.loss_difference for at in found], "|light − heavy|", LIGHT_COLOUR)
    axes[0].set_ylabel("loss difference, nats a masked token")
    band(axes[1], times, [at.kl for at in found], "KL(heavy ‖ light)", LIGHT_COLOUR)
    baseline = [at.baseline_kl for at in found if at.baseline_kl is not None]
    if baseline:
        band(axes[1], times, baseline, "KL(heavy ‖ another heavy)", HEAVY_COLOUR)
        axes[1].plot(times, [at.relative_kl for at in found], "--", color=THIRD_COLOUR, label="difference")
    axes[1].set_ylabel("KL, nats a masked token")
    for axis in axes[:2]:
        axis.set_xlabel("t, the share that is masked (sampling runs from 1 to 0)")
        axis.invert_xaxis()
    if path:
        total = path[-1].stop
        middle = [(at.first + at.stop) / 2 / total for at in path]
        band(axes[2], middle, [at.revealed_kl for at in path], "at what is revealed", LIGHT_COLOUR)
        axes[2].set_ylabel("path KL, nats a text and segment")
        axes[2].set_xlabel("share of the steps done")
    for axis in axes:
        axis.legend(frameon=False)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    save(figure, title, target)


def band(axis: Axes, at: Sequence[float], values: Sequence[Estimate], label: str, colour: str) -> None:
    means = [value.mean for value in values]
    margins = [NORMAL_95 * value.standard_error for value in values]
    axis.plot(at, means, "-o", markersize=3, color=colour, label=label)
    low, high = ([m + sign * e for m, e in zip(means, margins)] for sign in (-1, 1))
    axis.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)


def plot_search(found: Sequence[Found], heavy: str, target: Path, title: str = "", shown: int = 5) -> None:
    """The best and worst schedules, how often each segment is light among the best and worst tenth, and influence."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    ordered = ranked(found)
    shown = min(shown, len(ordered) // 2) or 1
    picked = [*ordered[:shown], *ordered[-shown:]]
    light = next(model for entry in ordered for model in entry.models if model != heavy)
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    colours = [[to_rgb(HEAVY_COLOUR if m == heavy else LIGHT_COLOUR) for m in entry.models] for entry in picked]
    axes[0].imshow(colours, aspect="auto", interpolation="nearest")
    axes[0].set_yticks(range(len(picked)), [f"{float(entry.scores.mean()):.3f}" for entry in picked])
    axes[0].axhline(shown - 0.5, color="white", linewidth=4)
    axes[0].set_ylabel(f"score: best {shown}, worst {shown}")
    segments = range(len(picked[0].models))
    best, worst = frequencies(found, light)
    axes[1].bar([s - 0.2 for s in segments], best, 0.4, color=LIGHT_COLOUR, label="best tenth")
    axes[1].bar([s + 0.2 for s in segments], worst, 0.4, color=THIRD_COLOUR, label="worst tenth")
    axes[1].set_ylabel("share with the segment light")
    axes[1].legend(frameon=False)
    values = influence(found)[light]
    errors = [NORMAL_95 * value.standard_error for value in values]
    axes[2].bar(segments, [value.mean for value in values], yerr=errors, color=LIGHT_COLOUR, capsize=3)
    axes[2].axhline(0, color="black", linewidth=0.8)
    axes[2].set_ylabel("influence of a light segment")
    for axis in axes:
        axis.set_xlabel("segment, in the order of sampling")
        axis.set_xticks(segments, [str(s + 1) for s in segments])
    save(figure, title, target)


def save(figure: Figure, title: str, target: Path) -> None:
    """Write a figure, whole or not at all."""
    figure.suptitle(title)
    with replacing(target) as file:
        figure.savefig(file, format=target.suffix[1:], dpi=150)
