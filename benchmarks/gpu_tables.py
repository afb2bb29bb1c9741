"""Tables of what several GPUs are good for, from the results of `benchmarks.many_gpus`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.kernel_tables import caption, load, markdown, shapes


def distributed() -> str:
    """Samples a second on each number of GPUs, and what the rest of the time goes to."""
    content = load("distributed")
    text = (
        f"{caption(content)}; {content['num_samples']} samples of {content['length']:,} tokens in {content['steps']:,} "
        f"steps, {content['blocks']} blocks, width {content['width']}, bfloat16; medians of {content['rounds']} runs. "
        "*Same*: samples that are one GPU's to the token.\n\n"
    )

    def lost(run: dict[str, Any], name: str) -> str:
        return f"{run[name]:.2f} s" if run.get(name) is not None and run["ratio"] != 1.0 else "–"

    body = [
        [
            count,
            f"{run['median']:.2f} s",
            f"{run['samples_per_second']:.1f}",
            f"{run['ratio']:.2f} ×",
            f"{100 * run['efficiency']:.1f} %",
            lost(run, "shares"),
            lost(run, "exchange"),
            f"{100 * run['same']:.1f} %",
        ]
        for count, run in content["runs"].items()
    ]
    header = ["GPUs", "time", "samples/s", "", "efficiency", "lost in smaller shares", "in exchanges", "same"]
    return text + markdown(header, body)


def sharded() -> str:
    """Microseconds of the output layer on each number of GPUs, and the peer's published ones where there are any."""
    content = load("sharded")
    compared = sum(row["tokens_compared"] for row in content["table"])
    counts = [count for count in content["table"][0]["ms"] if count != "1"]
    differing = {count: sum(row["tokens_differing"][count] for row in content["table"]) for count in counts}
    told = ", ".join(f"{number} on {count} GPUs" for count, number in differing.items())
    text = (
        f"{caption(content)}, bfloat16; token and all statistics, medians in µs inside CUDA graphs with "
        f"the exchange by NCCL, L2 emptied; × is over one GPU. Of {compared:,} tokens, these differ from one "
        f"GPU's: {told}.\n"
    )
    for columns, depth in shapes(content):
        rows = [row for row in content["table"] if (row["columns"], row["depth"]) == (columns, depth)]
        text += f"\nV = {columns:,}, D = {depth:,}\n\n"
        body = [
            [f"{row['rows']:,}", f"{1e3 * row['ms']['1']['median']:.0f}"]
            + [f"{1e3 * row['ms'][count]['median']:.0f} ({row['ratio'][count]:.2f} ×)" for count in counts]
            for row in rows
        ]
        text += markdown(["rows", "1 GPU", *(f"{count} GPUs" for count in counts)], body)
    return text


def published() -> str:
    """FlashSampling's published figures at its shape, in the same form."""
    found = load("sharded")["published_microseconds"]
    rows = list(found["1"])
    body = [
        [row, f"{found['1'][row]:.0f}"]
        + [f"{times[row]:.0f} ({found['1'][row] / times[row]:.2f} ×)" for count, times in found.items() if count != "1"]
        for row in rows
    ]
    text = "FlashSampling as published (B200, V = 128,256, D = 8,192, token only, means in µs):\n\n"
    return text + markdown(["rows", "1 GPU", *(f"{count} GPUs" for count in found if count != "1")], body)


def training() -> str:
    """Tokens a second, and what became of the losses and of a killed rank, in three sentences."""
    content = load("training-gpus")
    (_, one), (count, many) = content["tokens_per_second"].items()
    speed, losses = content["speed_of"], content["losses_of"]
    killed, resumed = content["killed_at_step"], content["resumed_at_step"]
    return (
        f"{caption(content)}. Training {speed['blocks']} blocks of width {speed['width']} on batches of "
        f"{speed['batch_size']} × {speed['length']:,} tokens, bfloat16, not compiled: {one:,.0f} tokens/s on one "
        f"GPU, {many:,.0f} on {count}, {content['ratio']:.2f} times as many. In float32 (width {losses['width']}, "
        f"batches of {losses['batch_size']} × {losses['length']}) a run on {count} GPUs has the losses of one GPU "
        f"over {content['steps']} steps within {content['largest_relative_difference_of_losses']:.1e} of their "
        f"value; one of its ranks was killed after step {killed}, and it went on from step {resumed}.\n"
    )


def search() -> str:
    """How much faster a search is, in one sentence."""
    content = load("search-gpus")
    count = content["processes"]
    alone, ours, ratio = content["seconds"]["1"], content["seconds"][str(count)], content["ratio"]["search"]
    return (
        f"{caption(content)}. `mdkern search` over {content['schedules']} schedules of the shipped pair: "
        f"{alone['search']:.0f} s on one GPU, {ours['search']:.1f} s on {count} ({ratio:.2f} ×); with starting "
        f"Python and loading, {alone['command']:.0f} and {ours['command']:.0f} s. {content['same_scores']} of the "
        "schedules have the same scores to the bit.\n"
    )


FILES: dict[
    str, tuple[Callable[[], str], str]
] = {  # by name: what draws a table, and the results that it is drawn from
    "distributed": (distributed, "distributed"),
    "sharded": (sharded, "sharded"),
    "sharded-published": (published, "sharded"),
    "training-gpus": (training, "training-gpus"),
    "search-gpus": (search, "search-gpus"),
}
TABLES = {name: draw for name, (draw, file) in FILES.items() if (RESULTS / f"{file}.json").exists()}
