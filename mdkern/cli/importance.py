"""``mdkern importance``: at which times the light model is far from the heavy one."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern.cli.common import (
    add_models,
    check_plot,
    check_target,
    load_model,
    load_models,
    longest_of,
    positive,
    precisions,
)

if TYPE_CHECKING:
    from mdkern.evaluation.importance import ImportanceAt, PathImportanceAt
    from mdkern.evaluation.intervals import Estimate

EXAMPLES = """\
examples:
  mdkern importance --data held-out.txt --texts 8 --times 4 --length 64 --path-samples 4 --segments 4
      measure,t or steps,mean,standard error,count
      heavy loss,0.1250,3.806099,0.603095,8
      light loss,0.1250,3.823993,0.465774,8
      absolute loss difference,0.1250,0.545918,0.151158,8
      KL,0.1250,1.046422,0.140939,8
      ...
  mdkern importance --data held-out.txt --output importance.csv --plot importance.png
"""


def add_importance(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "importance",
        help="show at which times the heavy model is needed",
        description="Compare a heavy and a light model over the diffusion time on held-out text: the absolute\n"
        "difference of their losses, text by text, KL(heavy || light) and, along the heavy model's\n"
        "own samples, the KL of what each step reveals (Sedykh et al., 2604.02340, equations 6 and 7).\nWith --output, "
        "results are kept as they come in FILE.partial, and the same command goes on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_importance)
    add_models(parser)
    parser.add_argument("--baseline", metavar="PATH", help="a second heavy model, whose KL is subtracted (eq. 7)")
    text = parser.add_argument_group("text")
    text.add_argument("--data", metavar="FILE", type=Path, required=True, help="held-out text, .txt or .txt.xz")
    text.add_argument("--texts", metavar="N", type=positive, default=500, help="windows of it (default: 500)")
    text.add_argument("--length", metavar="L", type=positive, help="tokens of a window (default: the models' longest)")
    text.add_argument("--times", metavar="N", type=positive, default=20, help="diffusion times (default: 20)")
    text.add_argument("--path-samples", metavar="N", type=int, default=16, help="samples for the path KL; 0: none")
    text.add_argument("--segments", metavar="N", type=positive, help="of the path (default: 10)")
    text.add_argument("--batch-size", metavar="B", type=positive, default=32, help="texts in a pass (default: 32)")
    text.add_argument("--seed", metavar="S", type=int, default=0, help="of the masks and samples (default: 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", type=Path, help="the table as CSV (default: standard output)")
    output.add_argument("--plot", metavar="FILE", type=Path, help="also draw it: .png, .svg or .pdf")


def run_importance(arguments: argparse.Namespace) -> None:
    """Measure, write the table, draw the plot."""
    check_plot("--plot", arguments.plot)
    if arguments.output is not None:
        check_target("--output", arguments.output)
    if arguments.path_samples < 0:
        raise ValueError(f"--path-samples must be at least 0, not {arguments.path_samples}")
    if arguments.segments is not None and not arguments.path_samples:
        raise ValueError("--segments goes with --path-samples of at least 1")

    from mdkern.digest import digest, model_digest
    from mdkern.evaluation.corpus import windows
    from mdkern.evaluation.importance import importance, path_importance
    from mdkern.evaluation.kept import Kept
    from mdkern.files import write_whole
    from mdkern.schedule import check_segments

    models, tokenizer = load_models(arguments)
    if set(models) != {"H", "L"}:
        raise ValueError(f"importance compares two models, --heavy and --light, not {', '.join(models)}")
    heavy, light = models["H"], models["L"]
    device, dtype = heavy.device, heavy.dtype
    baseline = (
        None
        if arguments.baseline is None
        else load_model("B", arguments.baseline, dtype, device, **precisions(arguments))
    )
    length = arguments.length or longest_of((heavy, light), None)
    segments = arguments.segments or 10
    if arguments.path_samples:
        check_segments(segments, length)
    ids = windows(arguments.data, tokenizer, length, arguments.texts).to(device)
    samples = {"num_samples": arguments.path_samples, "length": length, "segments": segments}
    kept = None
    if arguments.output is not None:
        compared = {name: model_digest(model) for name, model in models.items()}
        compared |= {} if baseline is None else {"baseline": model_digest(baseline)}
        setting = {"models": compared, "texts": digest(ids), "times": arguments.times, "seed": arguments.seed}
        kept = Kept(arguments.output.with_name(f"{arguments.output.name}.partial"), setting | samples)
    common: dict[str, Any] = {"batch_size": arguments.batch_size, "seed": arguments.seed, "kept": kept}
    found = importance(heavy, light, input_ids=ids, baseline=baseline, times=arguments.times, **common)
    path = path_importance(heavy, light, **samples, **common) if arguments.path_samples else []
    text = table(found, path)
    if arguments.output is None:
        print(text, end="")
    else:
        write_whole(arguments.output, text)
        print(f"mdkern: wrote {arguments.output}: {len(ids)} windows of {length} tokens", file=sys.stderr)
    if kept is not None:
        kept.remove()
    if arguments.plot is not None:
        from mdkern.evaluation.plots import plot_importance

        plot_importance(found, path, arguments.plot, f"{len(ids)} windows of {length} tokens of {arguments.data.name}")


def table(found: list[ImportanceAt], path: list[PathImportanceAt]) -> str:
    """A CSV table with a row for each time and for each segment of the path, with means and standard errors."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["measure", "t or steps", "mean", "standard error", "count"])
    rows: list[tuple[str, str, Estimate | None]] = []
    for at in found:
        t = f"{at.t:.4f}"
        rows += [("heavy loss", t, at.heavy_loss), ("light loss", t, at.light_loss)]
        rows += [("absolute loss difference", t, at.loss_difference)]
        rows += [("KL", t, at.kl), ("baseline KL", t, at.baseline_kl)]
    for part in path:
        steps = f"{part.first}-{part.stop}"
        rows.append(("path KL of what is revealed", steps, part.revealed_kl))
        rows.append(("path KL of what is masked", steps, part.masked_kl))
    for measure, where, value in rows:
        if value is not None:
            writer.writerow([measure, where, f"{value.mean:.6f}", f"{value.standard_error:.6f}", value.count])
    return out.getvalue()
