"""Tables and the plot of the paper setting's benchmark: ``python -m benchmarks.paper_tables`` draws the plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.kernel_tables import load, markdown
from benchmarks.paper_setting import HEAVY, LIGHT

LABELS = {HEAVY: "all heavy, 12 blocks", LIGHT: "all light, 4 blocks"}
# Sedykh et al., 2604.02340, 4-block light model in a sandwich, at 0, 10, ..., 100 % light steps: per cent saved.
PAPER_FLOPS = (0, 6.7, 13.3, 20, 26.7, 33.3, 40, 46.7, 53.3, 60, 66.7)
PAPER_CLOCK = (0, 3.0, 5.8, 8.5, 11.3, 14.0, 17.0, 17.3, 22.2, 22.7, 28.3)


def read() -> tuple[dict[str, Any], str]:
    """The parts, and what they were measured on."""
    content = load("paper-setting")
    known = content["environment"]
    return content["parts"], f"{known['device']}, torch {known['torch']}, Triton {known['triton']}"


def headline() -> str:
    """Seconds of 16 samples: ours, eager, compiled."""
    parts, machine = read()
    timed = parts["eager"][HEAVY]["timed_steps"]
    text = (
        f"{machine}. Seconds for 16 samples of 1,024 tokens in 1,000 steps. mdkern: median (least to most) of "
        f"{len(parts['ours'][HEAVY]['seconds'])} whole runs. The baselines run every step alike, so their runs are "
        f"1,000 times the median of {timed} steps, and the closing pass; in brackets the step's median and quartiles "
        f"in ms. × is over mdkern; compiled is torch.compile, mode {parts['compiled']['mode']}.\n\n"
    )

    def slow(name: str, part: str) -> str:
        run, step = parts[part][name], parts[part][name]["milliseconds"]
        ratio = run["run"] / parts["ours"][name]["median"]
        return f"{run['run']:.2f} s ({step['step']:.2f}, {step['lower']:.2f}–{step['upper']:.2f}) {ratio:.1f} ×"

    rows = []
    for name, label in LABELS.items():
        run = parts["ours"][name]
        spread = f"{run['median']:.2f} s ({min(run['seconds']):.2f}–{max(run['seconds']):.2f})"
        rows.append([label, f"{run['passes']:.0f}", spread, slow(name, "eager"), slow(name, "compiled")])
    return text + markdown(["models", "passes a sequence", "mdkern", "eager, as MDLM's code", "compiled"], rows)


def inside() -> str:
    """A step of ours: backbone, its arithmetic, head and sampling, idling, memory."""
    parts, machine = read()
    found = parts["inside"]
    text = (
        f"{machine}; per pass of 16 sequences, from a profiler's trace. Arithmetic: the pass's FLOPs at the rate of an "
        f"8192³ bfloat16 product in the same run, {found['product_tflops']:.0f} TFLOP/s.\n\n"
    )
    rows = []
    for name, label in LABELS.items():
        part = found[name]
        rows.append(
            [
                label,
                f"{part['tick_ms']:.2f} ms",
                f"{part['backbone_ms']:.2f} ms ({part['arithmetic_ms'] / part['backbone_ms']:.0%})",
                f"{part['arithmetic_ms']:.2f} ms",
                f"{part['head_ms']:.3f} ms ({part['head_ms'] / part['tick_ms']:.1%})",
                f"{part['idle_share']:.1%}",
                f"{part['peak_allocated_mib']:,.0f} MiB beside {part['weights_mib']:,.0f}",
            ]
        )
    header = ["models", "pass", "backbone (of it arithmetic)", "arithmetic", "head + sampling", "GPU idle"]
    return text + markdown([*header, "peak memory beside the weights"], rows)


def savings() -> str:
    """Table 2 of the paper beside ours."""
    parts, machine = read()
    found = parts["savings"]
    text = (
        f"{machine}. Saved against no light step, by a 4-block light model in a sandwich with a 12-block heavy one; "
        f"largest difference between our two rows: {found['largest_deviation_points']:.1f} points.\n\n"
    )

    def per_cent(values: list[float] | tuple[float, ...]) -> list[str]:
        return [f"{value:.1f}" for value in values]

    rows = found["rows"]
    body = [
        ["mdkern: FLOPs saved, counted, %", *per_cent([100 * row["flops_saved"] for row in rows])],
        ["**mdkern: wall-clock saved, %**", *per_cent([100 * row["clock_saved"] for row in rows])],
        ["the paper: FLOPs saved, %", *per_cent(PAPER_FLOPS)],
        ["the paper: wall-clock saved, %", *per_cent(PAPER_CLOCK)],
    ]
    return text + markdown(["% light steps", *(f"{100 * row['share']:.0f}" for row in rows)], body)


def sizes() -> str:
    """Other batch sizes, lengths and numbers of steps."""
    parts, machine = read()
    rows = [
        [
            LABELS[row["model"]],
            f"{row['batch_size']}",
            f"{row['length']:,}",
            f"{row['steps']:,}",
            f"{row['mdkern']['passes']:.0f}",
            f"{row['mdkern']['median']:.2f} s",
            f"{row['eager']['run']:.2f} s",
            f"{row['ratio']:.1f} ×",
        ]
        for row in parts["other_sizes"]["rows"]
    ]
    header = ["models", "batch", "length", "steps", "passes a sequence", "mdkern", "eager, as MDLM's code", "ratio"]
    return f"{machine}; one batch each.\n\n" + markdown(header, rows)


def scaling() -> str:
    """Seconds over the number of samples."""
    parts, machine = read()
    found = parts["scaling"]
    rows = [
        [f"{row['samples']}", f"{row['per_sample'] * row['samples']:.3f} s", f"{1e3 * row['per_sample']:.1f} ms"]
        for row in sorted(found["rows"], key=lambda row: row["samples"])
    ]
    text = f"{machine}; light model, batches of 16, {found['length']:,} tokens in {found['steps']:,} steps.\n\n"
    return text + markdown(["samples", "time", "a sample"], rows)


def invariant() -> str:
    """What the same bits in any batch cost."""
    parts, machine = read()
    if not parts.get("invariant", {}).get("rows"):
        return "Not measured yet."
    rows = []
    for row in parts["invariant"]["rows"]:
        times = (
            f"{statistics.median(row[name]):.3f} s ({min(row[name]):.3f}–{max(row[name]):.3f})"
            for name in ("default", "invariant")
        )
        rows.append([f"{row['batch_size']}", *times, f"{100 * (row['ratio'] - 1):+.0f} %"])
    shape = parts["invariant"]["rows"][0]
    text = f"{machine}; 12 blocks, {shape['length']:,} tokens in {shape['steps']:,} steps; median (least to most).\n\n"
    return text + markdown(["batch", "default", "`batch_invariant=True`", "time"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "paper-setting": headline,
    "paper-inside": inside,
    "paper-savings": savings,
    "paper-sizes": sizes,
    "paper-scaling": scaling,
    "paper-invariant": invariant,
}


def plot_savings() -> None:
    """Wall-clock saved over the share of light steps, ours and the paper's, beside the FLOPs saved."""
    from matplotlib.figure import Figure

    parts, machine = read()
    rows = parts["savings"]["rows"]
    share = [100 * row["share"] for row in rows]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(share, [100 * row["flops_saved"] for row in rows], "--", color="C0", label="mdkern, FLOPs")
    axis.plot(share, [100 * row["clock_saved"] for row in rows], "-o", color="C0", label="mdkern, wall-clock")
    axis.plot(share, PAPER_FLOPS, "--", color="C1", label="the paper, FLOPs")
    axis.plot(share, PAPER_CLOCK, "-s", color="C1", label="the paper, wall-clock")
    axis.set_xlabel("light steps, %")
    axis.set_ylabel("saved, %")
    axis.set_title(machine, fontsize=9, wrap=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "clock_follows_flops.svg", metadata={"Date": None})


if __name__ == "__main__":
    plot_savings()
