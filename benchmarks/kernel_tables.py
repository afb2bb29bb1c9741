"""Tables and log-log plots of the kernels' benchmarks: ``python -m benchmarks.kernel_tables`` draws the plots.

The tables stand in the README through `benchmarks.report`; the plots lie beside the JSON they are drawn from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.bench_vocab_projection import GEMM, GREEDY, MIXED, SAMPLED
from benchmarks.harness import RESULTS

OURS = (SAMPLED, GREEDY, MIXED)


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def caption(content: dict[str, Any]) -> str:
    known = content["environment"]
    return f"{known['device']}, torch {known['torch']}, Triton {known['triton']}"


def microseconds(timing: dict[str, float] | None) -> str:
    return "–" if timing is None else f"{timing['median'] * 1e3:.1f}"


def shapes(content: dict[str, Any]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["columns"], row["depth"]) for row in content["table"]))


def vocab_projection() -> str:
    """Per shape: microseconds of ours, with the ratio to the GEMM alone, and of every peer; and the memory it takes."""
    content = load("vocab_projection")
    text = f"{caption(content)}, bfloat16; medians in µs inside CUDA graphs, L2 emptied; × is over the GEMM alone.\n"
    for columns, depth in shapes(content):
        rows = [row for row in content["table"] if (row["columns"], row["depth"]) == (columns, depth)]
        names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
        ours, peers = [n for n in OURS if n in names], [n for n in names if n not in (*OURS, GEMM)]

        def ratio(row: dict[str, Any], name: str) -> str:
            times = row["ms"].get(name), row["ms"][GEMM]
            return f"{microseconds(times[0])} ({times[0]['median'] / times[1]['median']:.2f} ×)" if times[0] else "–"

        body = [
            [
                f"{row['rows']:,}",
                *(ratio(row, name) for name in ours),
                microseconds(row["ms"][GEMM]),
                *(microseconds(row["ms"].get(name)) for name in peers),
            ]
            for row in rows
        ]
        text += f"\nV = {columns:,}, D = {depth}:\n\n" + markdown(["rows", *ours, GEMM, *peers], body)
        text += memory(rows[-1])
    return text


def memory(row: dict[str, Any]) -> str:
    """What a call of each contender takes at the most rows, where it was measured."""
    peaks = "; ".join(f"{name} {mib:,.1f} MiB" for name, mib in row.get("peak_mib", {}).items())
    return f"\nPeak memory of one call at {row['rows']:,} rows, outputs included: {peaks}.\n" if peaks else ""


def select() -> str:
    """Microseconds of ours and of the chain of torch operations, a row for each size."""
    content = load("select")
    rules = list(dict.fromkeys(row["rule"] for row in content["table"]))
    sizes = list(dict.fromkeys((row["sequences"], row["entries"]) for row in content["table"]))
    cells = {(row["sequences"], row["entries"], row["rule"]): row["ms"] for row in content["table"]}

    def cell(milliseconds: dict[str, dict[str, float]]) -> str:
        ours, theirs = milliseconds["mdkern"]["median"], milliseconds["torch"]["median"]
        return f"{ours * 1e3:.1f} of {theirs * 1e3:.1f} ({theirs / ours:.1f} ×)"

    body = [[f"{b:,} × {r:,}", *(cell(cells[b, r, rule]) for rule in rules)] for b, r in sizes]
    text = f"{caption(content)}; medians in µs, ours of the torch chain's (how many times faster).\n\n"
    return text + markdown(["sequences × positions", *(f"`{rule}`" for rule in rules)], body)


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, the same in every panel of a picture."""
    return {name: f"C{number}" for number, name in enumerate(dict.fromkeys(names))}


def plot_vocab_projection() -> None:
    from matplotlib.figure import Figure

    content = load("vocab_projection")
    panels = shapes(content)
    colour = colours(name for row in content["table"] for name in row["ms"])
    figure = Figure(figsize=(6 * len(panels), 5.4), layout="constrained")
    for axis, (columns, depth) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        rows = [row for row in content["table"] if (row["columns"], row["depth"]) == (columns, depth)]
        for name in dict.fromkeys(name for row in rows for name in row["ms"]):
            points = [(row["rows"], row["ms"][name]["median"] * 1e3) for row in rows if name in row["ms"]]
            style = "-o" if name in OURS else "--s" if name == GEMM else ":^"
            axis.loglog(*zip(*points), style, color=colour[name], label=name, markersize=4)
        axis.set_title(f"V = {columns:,}, D = {depth:,}")
        axis.set_xlabel("rows")
        axis.set_ylabel("µs")
        axis.grid(alpha=0.3)
    save(figure, "vocab_projection", content, columns=4)


def plot_select() -> None:
    from matplotlib.figure import Figure

    content = load("select")
    rules = list(dict.fromkeys(row["rule"] for row in content["table"]))
    colour = colours(f"{row['sequences']}" for row in content["table"])
    figure = Figure(figsize=(3.4 * len(rules), 4.4), layout="constrained")
    axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for axis, rule in zip(axes, rules):
        for sequences in dict.fromkeys(row["sequences"] for row in content["table"]):
            rows = [row for row in content["table"] if (row["sequences"], row["rule"]) == (sequences, rule)]
            for name, style in (("mdkern", "-o"), ("torch", ":^")):
                points = [(row["entries"], row["ms"][name]["median"] * 1e3) for row in rows]
                label = f"{name}, {sequences} sequence{'s' if sequences > 1 else ''}"
                axis.loglog(*zip(*points), style, color=colour[f"{sequences}"], label=label, markersize=4)
        axis.set_title(rule)
        axis.set_xlabel("positions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs")
    save(figure, "select", content, columns=3)


def save(figure: Any, name: str, content: dict[str, Any], columns: int) -> None:
    """Write a picture with one legend for all of its panels, the device above."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(caption(content), fontsize=10)
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    plot_vocab_projection()
    plot_select()
