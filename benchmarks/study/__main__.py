"""Run the study: ``python -m benchmarks.study --device cuda --size full --data held-out.txt``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import RESULTS
from benchmarks.study.runner import ORDER, PARTS, Budget, Record, calibrate, in_order, lacking, run_parts
from benchmarks.study.setting import JUDGE, SIZES, load_study


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Run the experiments of docs/study.md. Each part is kept as soon as it is measured, and a part "
        "that is there is skipped, so that the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small", help="(default: small, minutes on a CPU)")
    parser.add_argument("--samples", metavar="N", type=int, help="a point, instead of the size's number")
    parser.add_argument("--length", metavar="L", type=int, help="tokens of a text, instead of the size's")
    parser.add_argument("--parts", metavar="NAME", nargs="+", default=list(ORDER), help=", ".join(ORDER))
    parser.add_argument("--minutes", metavar="M", type=float, help="leave out parts that will not fit")
    parser.add_argument("--models", metavar="FOLDER", type=Path, help="with 4, 12, 12b … and tokenizer in it")
    parser.add_argument("--judge", metavar="FOLDER", type=Path, default=JUDGE, help="(default: the one here)")
    parser.add_argument("--data", metavar="FILE", type=Path, help="held-out text, .txt or .txt.xz")
    parser.add_argument("--output", metavar="FILE", type=Path, help="(default: full: benchmarks/results, else runs/)")
    parser.add_argument(
        "--with",
        dest="parts_of",
        metavar="FILE",
        type=Path,
        help="results on the same pair, for parts that others need and --output does not have",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure parts anew that are there")
    parser.add_argument("--list", action="store_true", help="say what each part would take, and run none")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for. The exit code is 1 if something was left out that more time would have given."""
    parser = build_parser()
    asked = parser.parse_args(arguments)
    budget = Budget(None if asked.minutes is None else 60 * asked.minutes)
    pair = "shipped" if asked.models is None else asked.models.name
    folder = RESULTS if asked.size == "full" else Path("runs")
    path = asked.output or folder / f"study-{pair}.json"
    try:
        names = in_order(asked.parts)
        changes = {name: getattr(asked, name) for name in ("samples", "length") if getattr(asked, name) is not None}
        size = replace(SIZES[asked.size], **changes)
        study = load_study(size, asked.device, asked.models, asked.judge, asked.data, asked.seed)
        record = Record(path, study, asked.parts_of)
    except ValueError as error:
        parser.error(str(error))
    calibrate(study, budget)
    if asked.list:
        for name in names:
            reason = lacking(name, study)
            passes = 0.0 if reason else PARTS[name].passes(study)
            print(f"{name}: {reason or f'{passes:,.0f} heavy passes, about {budget.predicted(passes):.0f} s'}")
        return 0
    left_out = run_parts(record, names, budget, asked.again, lambda line: print(line, flush=True))
    print(f"{path}: {len(record.parts)} parts")
    for name, reason in left_out.items():
        print(f"not run: {name} ({reason})")
    return int(any(lacking(name, study) is None for name in left_out))


if __name__ == "__main__":
    sys.exit(main())
