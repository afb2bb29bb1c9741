"""Tables of the decoders' benchmark, for `benchmarks.report`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.decoder_setting import Shape, Size
from benchmarks.kernel_tables import load, markdown

SIZE = Size()


def read(part: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The part's rows, and what they were measured on."""
    content = load("decoders")
    known = content["environment"]
    return content["parts"][part], f"{known['device']}, torch {known['torch']}, Triton {known.get('triton', '–')}"


def label(name: str, row: dict[str, Any]) -> str:
    return name if row["block_length"] is None else f"{name}, blocks of {row['block_length']}"


def spread(seconds: list[float], median: float) -> str:
    return f"{median:.2f} s ({min(seconds):.2f}–{max(seconds):.2f})"


def pair() -> str:
    """Passes, speed and quality on the shipped pair."""
    rows, machine = read("pair")
    first = next(iter(rows.values()))
    text = (
        f"{machine}. The shipped heavy model, {SIZE.pair_length} tokens from nothing at temperature 1, "
        f"{SIZE.pair_steps} steps where a decoder has a number of steps, {SIZE.pair_samples} samples in one batch: "
        f"tokens/s is the median of {len(first['ours']['seconds'])} whole runs (fewer if they are long) and one whole "
        f"run of the plain loop. Judge perplexity (± its standard error) and the entropy of a sample's tokens (nats): "
        f"{first['ours']['samples']} samples of ours, {first['plain']['samples']} of the plain loop's.\n\n"
    )
    body = []
    for name, row in rows.items():
        ours, theirs = row["ours"], row["plain"]
        body.append(
            [
                label(name, row),
                f"{ours['passes']:.0f}",
                f"{SIZE.pair_length / ours['passes']:.1f}",
                f"{ours['tokens_per_second']:,.0f}",
                f"{theirs['tokens_per_second']:,.0f} ({row['source']})",
                f"{row['ratio']:.1f} ×",
                *(f"{run['perplexity']:.0f} ± {run['perplexity_error']:.0f}" for run in (ours, theirs)),
                f"{ours['token_entropy']:.2f}",
            ]
        )
    header = ["decoder", "passes (NFE)", "tokens a pass", "tokens/s", "plain loop's", "ratio", "judge perplexity"]
    return text + markdown([*header, "plain loop's", "token entropy"], body)


def shape_of(shape: Shape) -> str:
    return f"{shape.blocks} blocks, width {shape.width:,}, V = {shape.vocab_size:,}, bfloat16, random weights"


def size() -> str:
    """At the paper's size."""
    rows, machine = read("size")
    shape, some = SIZE.paper, next(iter(rows.values()))
    text = (
        f"{machine}. {shape_of(shape)}: {SIZE.batch} sequences of {shape.length:,} tokens, {shape.prompt} of them "
        f"given; {shape.steps} steps, 8 tokens each, where a decoder has a number of steps. mdkern: median (least to "
        f"most) of {len(some['ours']['seconds'])} whole runs, fewer where they are long. Plain loops, with heads of V "
        f"columns as MDLM's: {some['plain']['timed_steps']} steps are timed halfway, at half of the text masked; a run "
        "is their median (quartiles) times the method's steps, for decoders that stop by themselves as many as mdkern "
        "took. Their bounds are set to what random weights give. × is the loop's time over ours.\n\n"
    )
    body = []
    for name, row in rows.items():
        ours, loop = row["ours"], row["plain"]
        step = {quartile: 1e3 * value for quartile, value in loop["step"].items()}
        body.append(
            [
                label(name, row),
                f"{ours['passes']:.0f}",
                spread(ours["seconds"], ours["median"]),
                f"{ours['tokens_per_second']:,.0f}",
                f"{step['median']:.1f} ms ({step['lower']:.1f}–{step['upper']:.1f})",
                f"{loop['run']:.1f} s ({row['source']})",
                f"{loop['tokens_per_second']:,.0f}",
                f"{row['ratio']:.1f} ×",
            ]
        )
    header = ["decoder", "passes", "mdkern", "tokens/s", "a step of the plain loop", "its run", "tokens/s", "ratio"]
    return text + markdown(header, body)


def llada() -> str:
    """LLaDA-8B's shapes."""
    rows, machine = read("llada")
    shape, some = SIZE.llada, next(iter(rows.values()))
    text = (
        f"{machine}. {shape_of(shape)}: {shape.length - shape.prompt} tokens after {shape.prompt} given ones, blocks "
        f"of {shape.block_length}, all above a probability of {some['parameters']['threshold']:.2f} (what random "
        "weights give for several tokens a pass), greedily. Whole runs. The cache is an approximation, so that its "
        "passes differ.\n\n"
    )
    loops = {row["batch"]: row for row in rows.values() if row["way"] == "plain loop"}
    body = []
    for row in rows.values():
        loop = loops.get(row["batch"])
        ratio = "–" if loop is None else f"{row['tokens_per_second'] / loop['tokens_per_second']:.1f} ×"
        speed = f"{row['tokens_per_second']:,.0f}"
        body.append([f"{row['batch']}", row["way"], f"{row['passes']:.0f}", speed, ratio, f"{row['peak_gib']:.1f} GiB"])
    return text + markdown(["batch", "", "passes", "tokens/s", "to the plain loop", "peak memory"], body)


def caches() -> str:
    """What caches do to the text of the shipped pair."""
    rows, machine = read("caches")
    samples = next(iter(rows.values()))["samples"]
    text = (
        f"{machine}. The shipped heavy model, {samples} samples of {SIZE.pair_length} tokens in {SIZE.pair_steps} "
        f"steps, blocks of {SIZE.pair_block}. Loss: the model's own cross-entropy of half of the tokens given the "
        "other half.\n\n"
    )
    body = [
        [
            name,
            f"{row['passes']:.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['differ']:.0%}",
            f"{row['differ_in_first_block']:.0%}",
            f"{row['loss']:.2f}",
        ]
        for name, row in rows.items()
    ]
    header = ["decoder, cache", "passes", "tokens/s", "tokens that differ", "in the first block", "loss, nats a token"]
    return text + markdown(header, body)


TABLES: dict[str, Callable[[], str]] = {
    "decoders": pair,
    "decoders-size": size,
    "llada-shapes": llada,
    "caches": caches,
}
