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


def plot_vocab_projection() -> None:
    import matplotlib.pyplot as plt

    content = load("vocab_projection")
    panels = shapes(content)
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axis, (columns, depth) in zip(axes[0], panels):
        rows = [row for row in content["table"] if (row["columns"], row["depth"]) == (columns, depth)]
        for name in dict.fromkeys(name for row in rows for name in row["ms"]):
            points = [(row["rows"], row["ms"][name]["median"] * 1e3) for row in rows if name in row["ms"]]
            style = "-o" if name in OURS else "--s" if name == GEMM else ":^"
            axis.loglog(*zip(*points), style, label=name, markersize=4)
        axis.set_title(f"V = {columns:,}, D = {depth}")
        axis.set_xlabel("rows")
        axis.set_ylabel("µs")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save(figure, "vocab_projection")


def plot_select() -> None:
    import matplotlib.pyplot as plt

    content = load("select")
    rules = list(dict.fromkeys(row["rule"] for row in content["table"]))
    figure, axes = plt.subplots(1, len(rules), figsize=(4 * len(rules), 4), sharey=True)
    for axis, rule in zip(axes, rules):
        for sequences in dict.fromkeys(row["sequences"] for row in content["table"]):
            rows = [row for row in content["table"] if (row["sequences"], row["rule"]) == (sequences, rule)]
            for name, style in (("mdkern", "-o"), ("torch", ":^")):
                points = [(row["entries"], row["ms"][name]["median"] * 1e3) for row in rows]
                axis.loglog(*zip(*points), style, label=f"{name}, {sequences} sequences", markersize=4)
        axis.set_title(rule)
        axis.set_xlabel("positions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs")
    axes[0].legend(fontsize=7)
    save(figure, "select")


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.svg")


if __name__ == "__main__":
    plot_vocab_projection()
    plot_select()
