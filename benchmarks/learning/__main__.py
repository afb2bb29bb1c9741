"""Run the experiments of docs/learning.md: ``python -m benchmarks.learning --device cuda --size full --seed 0``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from benchmarks.harness import RESULTS
from benchmarks.learning.runner import Record, run_parts
from benchmarks.learning.setting import SIZES, Study
from benchmarks.learning.stages import PARTS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description="Run the experiments of docs/learning.md for one seed; processes with other seeds may fill the "
        "same file beside it. Each part is kept as soon as it is measured, and a part that is there is skipped, so "
        "that the same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small", help="(default: small)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", metavar="NAME", nargs="+", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--minutes", metavar="M", type=float, help="leave out parts that will not fit")
    parser.add_argument("--gsm", metavar="FOLDER", type=Path, help="with gsm8k_train.jsonl.xz and gsm8k_test.jsonl.xz")
    parser.add_argument("--bidirectional", action="store_true", help="models that see the whole text")
    parser.add_argument("--cache", choices=["block", "none"], help="(default: block, without --bidirectional)")
    parser.add_argument("--runs", metavar="FOLDER", type=Path, default=Path("runs/learning"), help="of checkpoints")
    parser.add_argument("--output", metavar="FILE", type=Path, help="(default: full: benchmarks/results, else runs/)")
    parser.add_argument("--again", action="store_true", help="measure parts anew that are there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for. The exit code is 1 if something was left out or failed."""
    parser = build_parser()
    asked = parser.parse_args(arguments)
    folder = RESULTS if asked.size == "full" else Path("runs")
    path = asked.output or folder / "learning-problems.json"
    logging.basicConfig(format=f"%(asctime)s seed {asked.seed}: %(message)s", stream=sys.stdout)
    logging.getLogger("training").setLevel(logging.INFO)
    torch.set_float32_matmul_precision("high")
    runs = asked.runs / f"{asked.size}{'-bidirectional' if asked.bidirectional else ''}"
    (runs / str(asked.seed)).mkdir(parents=True, exist_ok=True)
    cache = asked.cache or ("none" if asked.bidirectional else "block")
    device = torch.device(asked.device)
    study = Study(SIZES[asked.size], asked.seed, device, runs, asked.gsm, not asked.bidirectional, cache)
    try:
        record = Record(path, study)
        left_out = run_parts(record, asked.parts, asked.minutes, asked.again, lambda line: print(line, flush=True))
    except ValueError as error:
        parser.error(str(error))
    for name, reason in left_out.items():
        print(f"seed {asked.seed}: not run: {name} ({reason})")
    return int(bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
