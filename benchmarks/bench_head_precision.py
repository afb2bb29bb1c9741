"""The output layer with its weight in 8 bits, in 16 bits, and the padded GEMM alone: times, and what rounding changes.

    python -m benchmarks.bench_head_precision FOLDER              # one GPU, a minute; writes FOLDER/head-precision.json
    python -m benchmarks.bench_head_precision FOLDER --tiny       # a small head on a CPU, to try it out

What rounding changes is measured on the shipped pair, at masked positions of texts that the heavy model writes itself:
how far the distributions of a position are apart (total variation), and how often the most probable token and the
token drawn with the same noise are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mdkern
from benchmarks.bench_vocab_projection import GEMM, SAMPLED, Problem, Shape
from benchmarks.harness import (
    RESULTS,
    GpuTimer,
    compare_on_host,
    environment,
    folder_command,
    host_environment,
    write_text_whole,
)
from benchmarks.kernel_tables import caption, markdown, microseconds
from mdkern.kernels import vocab_projection
from mdkern.kernels.backbone.quantise import quantise_rows
from mdkern.models import DiT, adapt
from mdkern.pretrained import load_pair

ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = (Shape(50_258, 768, ROWS), Shape(126_464, 4096, ROWS), Shape(262_144, 2816, ROWS))
TINY = (Shape(1_000, 64, (1, 4)),)
FLOAT8 = "mdkern, weight in 8 bits"
KEPT = RESULTS / "head-precision.json"
ABSENT = "Not measured yet.\n"
SHARES = (0.9, 0.5, 0.1)  # of the positions that are masked


def measure_times(shapes: Sequence[Shape], tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for each shape and number of rows."""
    timer = None if tiny else GpuTimer()
    for shape in shapes:
        for rows in shape.rows:
            problem = Problem(shape, rows, "cpu" if tiny else "cuda", torch.float32 if tiny else torch.bfloat16)
            runs = {
                SAMPLED: lambda problem=problem: problem.ours(1.0),
                FLOAT8: in_float8(problem),
                GEMM: lambda problem=problem: torch.nn.functional.linear(problem.hidden, problem.padded),
            }
            heavy = rows * shape.columns * shape.depth > 1e11
            if timer is None:
                times = compare_on_host(runs, 3)
            else:
                times = timer.compare(runs, turns=2 if heavy else 8, rounds=9)
            milliseconds = {name: timing.as_dict() for name, timing in times.items()}
            yield {"columns": shape.columns, "depth": shape.depth, "rows": rows, "ms": milliseconds}


def in_float8(problem: Problem) -> Any:
    """A run of the same rows with the weight in 8 bits."""
    weight, weight_scale = quantise_rows(problem.weight)

    def run() -> object:
        return vocab_projection(
            problem.source, weight, None, problem.row_index, 1.0, problem.seed, problem.keys,
            weight_scale=weight_scale, want_top=True, want_entropy=True,
        )  # fmt: skip

    return run


def measure_quality(model: DiT, texts: Tensor, shares: Sequence[float]) -> list[dict[str, float]]:
    """What rounding the output layer changes, at masked positions of texts ``[N, L]``: a row for each share.

    In float32 on the CPU, so that nothing else is rounded.
    """
    whole, rounded = adapt(model), adapt(model, head_precision="fp8")
    generator = torch.Generator(texts.device).manual_seed(1)
    found = []
    for share in shares:
        masked = torch.rand(texts.shape, device=texts.device, generator=generator) < share
        with torch.no_grad():
            hidden = whole.hidden(torch.where(masked, whole.mask_id, texts)).flatten(0, 1)
        rows = masked.flatten().nonzero()[:, 0]
        keys = torch.stack((rows // texts.shape[1], rows % texts.shape[1], rows * 0), 1)
        drawn, logits = [], []
        for head in (whole.head, rounded.head):
            drawn.append(
                vocab_projection(
                    hidden, head.weight, head.bias, rows, 1.0, torch.tensor(3, device=rows.device), keys,
                    weight_scale=head.weight_scale, want_argmax=True, want_entropy=True,
                )
            )  # fmt: skip
            logits.append(head.logits(hidden[rows]).double())
        p, q = (values.softmax(-1) for values in logits)
        variation = (p - q).abs().sum(-1) / 2
        entropies = [one.entropy.double().mean() for one in drawn if one.entropy is not None]
        found.append(
            {
                "share": share,
                "positions": len(rows),
                "variation": float(variation.mean()),
                "variation_99": float(variation.quantile(0.99)),
                "same_argmax": same(drawn[0].argmax, drawn[1].argmax),
                "same_draw": same(drawn[0].token, drawn[1].token),
                "entropy": float(entropies[0]),
                "entropy_rounded": float(entropies[1]),
            }
        )
    return found


def same(one: Tensor | None, other: Tensor | None) -> float:
    """The share of ids that are the same."""
    assert one is not None
    assert other is not None
    return float((one == other).double().mean())


def measure(folder: Path, tiny: bool) -> dict[str, Any]:
    """Measure, and write what there is after each part."""
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("a GPU is needed for times: --tiny measures a small head on the CPU")
    content: dict[str, Any] = {"environment": host_environment() | {"triton": "–"} if tiny else environment()}
    content |= {"table": [], "quality": {}, "failed": []}
    folder.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        write_text_whole(folder / KEPT.name, json.dumps(content, indent=1) + "\n")

    for row in measure_times(TINY if tiny else SHAPES, tiny):
        content["table"].append(row)
        keep()
    pair, size = load_pair("cpu"), {"num_samples": 2, "length": 32, "steps": 8} if tiny else {"num_samples": 16}
    texts = mdkern.sample(pair.heavy, seed=2, progress=False, **size).sequences  # type: ignore[arg-type]
    assert texts is not None
    for name, model in (("heavy", pair.heavy), ("light", pair.light)):
        content["quality"][name] = measure_quality(model, texts, SHARES[:1] if tiny else SHARES)
        keep()
    return content


def table(content: dict[str, Any]) -> str:
    """The times of each shape, then what rounding changes."""
    text = f"{caption(content)}, bfloat16; medians in µs inside CUDA graphs, L2 emptied; × is over the GEMM alone.\n\n"
    body = []
    for row in content["table"]:
        floor = row["ms"][GEMM]["median"]
        shown = (
            f"{microseconds(row['ms'][name])} ({row['ms'][name]['median'] / floor:.2f} ×)" for name in (SAMPLED, FLOAT8)
        )
        gain = row["ms"][SAMPLED]["median"] / row["ms"][FLOAT8]["median"]
        size = f"{row['columns']:,} × {row['depth']:,}"
        body.append([size, f"{row['rows']:,}", *shown, microseconds(row["ms"][GEMM]), f"{gain:.2f}"])
    text += markdown(["weight", "rows", SAMPLED, FLOAT8, GEMM, "times as fast as in 16 bits"], body)
    text += "\nThe shipped pair in float32 on a CPU, at the masked positions of texts that the heavy model wrote:\n\n"
    body = [
        [
            name,
            f"{row['share']:.0%}",
            f"{row['variation']:.4f} ({row['variation_99']:.3f})",
            f"{row['same_argmax']:.1%}",
            f"{row['same_draw']:.1%}",
            f"{row['entropy']:.3f}, {row['entropy_rounded']:.3f}",
        ]
        for name, rows in content["quality"].items()
        for row in rows
    ]
    header = ["model", "masked", "total variation, mean (99 % below)", "same argmax", "same draw", "entropy, rounded"]
    return text + markdown(header, body)


def head_precision() -> str:
    """The tables of the kept results."""
    return table(json.loads(KEPT.read_text())) if KEPT.exists() else ABSENT


def main(argv: Sequence[str] | None = None) -> int:
    return folder_command("bench_head_precision", __doc__ or "", measure, table, argv)


if __name__ == "__main__":
    raise SystemExit(main())
