"""Train a family of models for the study: ``python -m benchmarks.study.train --out runs/family --data books.txt.xz``.

All have one recipe, that of the shipped pair (mdkern/pretrained/README.md), one tokenizer and one text, and differ in
their depth; a letter after the number of blocks means another seed, which also changes the order of the data. Training
is `training.train`, one process a device, the longest first. The same command goes on where it stopped. The folder has
what ``python -m benchmarks.study --models`` reads: a subfolder for each model, in bfloat16, and ``tokenizer``; with
``--judge`` also a judge, and ``held-out.txt`` if that was split off the text. ``work`` has the runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mdkern.pretrained
from benchmarks.study.jobs import Job, run_jobs
from benchmarks.study.texts import Texts, prepare_texts, token_count
from mdkern.files import write_whole
from training.options import command_parser

SHIPPED = {"4": "light", "12": "heavy"}  # folders of mdkern.pretrained
PRETRAINED = Path(mdkern.pretrained.__file__).parent
HEAD_WIDTH = 64
JUDGE_EPOCHS = 8  # at most: an autoregressive model, which sees a text always the same, soon knows it by heart


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.study.train", __doc__, "--out FOLDER --data FILE [FILE ...]")
    parser.add_argument("--out", type=Path, required=True, help="the family's folder; its name is the study's")
    text = parser.add_argument_group("text")
    text.add_argument("--data", type=Path, nargs="+", required=True, help="text files, plain or .xz")
    text.add_argument("--held-out", type=Path, help="text to validate on; default: the last 3 %% of the documents")
    text.add_argument("--judge", action="store_true", help="train a judge, too, on every second document")
    text.add_argument("--vocab-size", type=int, help="train a tokenizer on the text; default: the shipped one")
    model = parser.add_argument_group("models")
    model.add_argument("--models", nargs="+", default=["4", "6", "8", "10", "12", "12b"], help="by blocks, as 4 or 12b")
    model.add_argument("--shipped", action="store_true", help="take the shipped pair as 4 and 12")
    model.add_argument("--width", type=int, default=192, help="(default: 192; a wider family: 384)")
    model.add_argument("--length", type=int, default=256)
    model.add_argument("--tokens", type=float, default=2.02e9, help="to train each on (default: 2.02e9)")
    model.add_argument("--batch-size", type=int, default=512, help="sequences a step (default: 512)")
    parser.add_argument("--devices", nargs="+", help="such as cuda:0 cuda:1; default: all GPUs, or the CPU")
    return parser


def check(asked: argparse.Namespace) -> None:
    """Raise ValueError on what cannot work, before anything is written."""
    wrong = [name for name in asked.models if not re.fullmatch(r"[1-9]\d*[a-z]?", name)]
    if wrong:
        raise ValueError(f"--models are named by their blocks, as 4 or 12b, not {', '.join(wrong)}")
    if len(set(asked.models)) < len(asked.models):
        raise ValueError("--models has a name twice")
    if asked.width > HEAD_WIDTH and asked.width % HEAD_WIDTH:
        raise ValueError(f"--width must be at most {HEAD_WIDTH} or a multiple of it, not {asked.width}")
    if asked.shipped:
        if asked.vocab_size is not None:
            raise ValueError("--shipped goes with the shipped tokenizer: leave out --vocab-size")
        config = json.loads((PRETRAINED / "heavy" / "config.json").read_text())
        for name, theirs in (("width", config["width"]), ("length", config["max_length"])):
            if getattr(asked, name) != theirs:
                raise ValueError(f"--shipped: the shipped pair has --{name} {theirs}, not {getattr(asked, name)}")
        if not set(SHIPPED) & set(asked.models):
            raise ValueError("--shipped has no effect: --models has neither 4 nor 12")


def heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)


def seed_of(name: str) -> int:
    """0 for a number alone, 1 for b, 2 for c …: of the first weights and of the order of the data."""
    return ord(name[-1]) - ord("a") if name[-1].isalpha() else 0


def blocks_of(name: str) -> int:
    return int(name.rstrip("abcdefghijklmnopqrstuvwxyz"))


def model_job(name: str, texts: Texts, asked: argparse.Namespace) -> Job:
    out = asked.out / "work" / name
    settings: dict[str, Any] = {
        "data": texts.train,
        "valid": texts.valid,
        "out": out,
        "preset": "small",
        "blocks": blocks_of(name),
        "width": asked.width,
        "heads": heads(asked.width),
        "length": asked.length,
        "tokens": asked.tokens,
        "batch-size": asked.batch_size,
        "seed": seed_of(name),
        "log-every": 100,
        "eval-batch-size": 256,
    }
    return Job(
        name=name,
        command=command("training.train", settings),
        cost=asked.tokens * asked.width * (blocks_of(name) + 1),
        result=out / "final-bf16",
        log=out.with_suffix(".log"),
        keep=partial(copy_whole, out / "final-bf16", asked.out / name),
    )


def judge_job(texts: Texts, asked: argparse.Namespace) -> Job:
    assert texts.judge is not None
    out, tokens = asked.out / "work" / "judge", min(asked.tokens, JUDGE_EPOCHS * token_count(texts.judge))
    settings: dict[str, Any] = {
        "data": texts.judge,
        "valid": texts.valid,
        "out": out,
        "length": asked.length,
        "tokens": tokens,
        "batch-size": min(256, asked.batch_size),
        "schedule": "cosine",
        "log-every": 100,
    }
    return Job(
        name="judge",
        command=command("training.judge", settings),
        cost=tokens * 256 * 7.0,
        result=out / "final",
        log=out.with_suffix(".log"),
        keep=partial(copy_whole, out / "final", asked.out / "judge"),
    )


def command(module: str, settings: dict[str, Any]) -> tuple[str, ...]:
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return (sys.executable, "-m", module, *options)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a folder so that it is there whole or not at all."""
    if target.exists():
        return
    partly = target.with_name(f".{target.name}.partly")
    shutil.rmtree(partly, ignore_errors=True)
    shutil.copytree(source, partly)
    partly.rename(target)


def describe(asked: argparse.Namespace) -> None:
    """Write family.json: the recipe, and each run's own evaluation on the held-out text."""
    evaluations = {}
    for name in [*asked.models, *(["judge"] if asked.judge else [])]:
        path = asked.out / "work" / name / "eval.json"
        if path.exists():
            evaluations[name] = json.loads(path.read_text())
    recipe = {name: getattr(asked, name) for name in ("models", "width", "length", "tokens", "batch_size", "shipped")}
    write_whole(asked.out / "family.json", json.dumps({"recipe": recipe, "held_out": evaluations}, indent=1) + "\n")


def prepared(asked: argparse.Namespace) -> list[Job]:
    """Make the token files of a family, put the shipped models into its folder, and return the jobs of the others.

    Raises:
        ValueError, FileNotFoundError: what `check` and `prepare_texts` raise.
    """
    check(asked)
    tokenizer = None if asked.vocab_size is not None else PRETRAINED / "tokenizer"
    texts = prepare_texts(asked.data, asked.out, asked.held_out, asked.judge, tokenizer, asked.vocab_size or 0)
    taken = set(SHIPPED) & set(asked.models) if asked.shipped else set()
    for name in taken:
        copy_whole(PRETRAINED / SHIPPED[name], asked.out / name)
    jobs = [model_job(name, texts, asked) for name in asked.models if name not in taken]
    return [*jobs, *([judge_job(texts, asked)] if asked.judge else [])]


def all_devices() -> list[str]:
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def main(arguments: list[str] | None = None) -> int:
    """Train what is not there yet. The exit code is 1 if a model is missing at the end."""
    parser = build_parser()
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        jobs = prepared(asked)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    devices = asked.devices or all_devices()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the jobs are stopped, too
    try:
        missing = run_jobs(jobs, devices, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there")
        return 1
    describe(asked)
    print(f"{asked.out}: " + (f"not finished: {', '.join(missing)}" if missing else "complete"))
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
