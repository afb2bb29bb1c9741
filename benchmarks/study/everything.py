"""All of the study by one command: ``python -m benchmarks.study.everything --out runs/study --size full --data books``.

It trains the family, the second text's models and their judge, and measures every part of docs/study.md, with one job
on a device at a time: what most is waiting for goes first. The same command goes on where it stopped, and a job that
fails holds up only what waits for it. `benchmarks.study.train` and `benchmarks.study` do the same step by step.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.study import train
from benchmarks.study.jobs import Job, run_jobs
from mdkern.files import write_whole
from training.options import command_parser

PAIR_PARTS = {  # of two models, shared out so that several devices have work; each list in its order
    "schedules": ("hand_made", "shares", "yardstick"),
    "search": ("path", "measures", "search", "prediction", "fitted"),
    "decoders": ("decoders", "order"),
    "others": ("routing", "prompted"),
}
NEED_TEXT = {"measures", "yardstick", "order", "prompted", "bounds"}
FAMILY_PARTS = "light_size", "three_models", "bounds"
SECOND_PARTS = "path", "measures", "search", "prediction", "fitted", "hand_made", "yardstick", "bounds"
WIDE_PARTS = "hand_made", "bounds"
SHIPPED, FAMILY, SECOND, WIDE = "shipped", "family", "wikipedia", "wide"  # names of folders and of results
# Of a job's cost, in tokens times width times blocks: about what a second of measuring is beside training.
SECONDS = 3e9


@dataclass(frozen=True)
class Size:
    """The options of `benchmarks.study.train` for the families, and of `benchmarks.study`."""

    family: tuple[str, ...]
    second: tuple[str, ...]
    wide: tuple[str, ...]
    measured: str  # the study's size
    second_length: int


TOY = ("--length", "32", "--tokens", "3e4", "--batch-size", "16")
SIZES = {
    "full": Size(
        family=("--shipped",),
        second=("--models", "12", "4", "--length", "128", "--tokens", "1.5e8", "--vocab-size", "4096", "--judge"),
        wide=("--models", "12", "4", "--width", "384"),
        measured="full",
        second_length=128,
    ),
    "small": Size(
        family=("--models", "1", "2", "3", "3b", "--width", "64", *TOY),
        second=("--models", "3", "1", "--width", "64", "--vocab-size", "1024", "--judge", *TOY),
        wide=("--models", "3", "1", "--width", "128", *TOY),
        measured="small",
        second_length=32,
    ),
}


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.study.everything", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of models, runs and logs")
    parser.add_argument("--data", type=Path, nargs="+", help="text of the family, plain or .xz; without it no family")
    parser.add_argument("--held-out", type=Path, help="text that none is trained on; default: the last 3 %% of --data")
    parser.add_argument("--second", type=Path, nargs="+", help="another text, for models and a judge of its own")
    parser.add_argument("--wide", action="store_true", help="a family twice as wide, too")
    parser.add_argument("--size", choices=SIZES, default="small", help="(default: small, minutes on a CPU)")
    parser.add_argument("--results", type=Path, help="(default: full: benchmarks/results, else the folder of --out)")
    parser.add_argument("--devices", nargs="+", help="such as cuda:0 cuda:1; default: all GPUs, or the CPU")
    parser.add_argument(
        "--list", action="store_true", help="prepare the texts, say what there is to run, and run none of it"
    )
    return parser


def study_job(
    asked: argparse.Namespace, name: str, parts: tuple[str, ...], after: tuple[str, ...], **options: Any
) -> Job:
    """A call of `benchmarks.study`. Options that are None are left out."""
    work = asked.out / "work"
    given = {"size": SIZES[asked.size].measured, "parts": parts} | options
    command = [sys.executable, "-m", "benchmarks.study"]
    for option, value in given.items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{option}", *map(str, values)]
    mark = work / f"{name.replace(' ', '-')}.done"
    return Job(
        name, tuple(command), SECONDS * len(parts), mark, mark.with_suffix(".log"), nothing, after=after, marks=True
    )


def nothing() -> None:
    """What a part leaves is in the results already."""


def jobs_of(asked: argparse.Namespace) -> tuple[list[Job], list[argparse.Namespace]]:
    """All jobs with what they wait for, and the families that are trained.

    Raises:
        ValueError, FileNotFoundError: texts that cannot be used.
    """
    size = SIZES[asked.size]
    results = asked.results or (RESULTS if asked.size == "full" else asked.out)
    files = {name: results / f"study-{name}.json" for name in (SHIPPED, FAMILY, SECOND, WIDE)}
    families = dict[str, argparse.Namespace]()
    if asked.data:
        given = ("--held-out", str(asked.held_out)) if asked.held_out else ()
        families[FAMILY] = family_of(asked.out / FAMILY, asked.data, *size.family, *given)
        if asked.wide:
            families[WIDE] = family_of(asked.out / WIDE, asked.data, *size.wide, *given)
    if asked.second:
        families[SECOND] = family_of(asked.out / SECOND, asked.second, *size.second)
    jobs, trained = list[Job](), dict[str, tuple[str, ...]]()
    for folder, family in families.items():
        own = [replace(job, name=f"{folder} {job.name}") for job in train.prepared(family)]
        jobs, trained[folder] = jobs + own, tuple(job.name for job in own)
    held_out = asked.held_out or (asked.out / FAMILY / "held-out.txt" if asked.data else None)

    def measured(name: str, parts: tuple[str, ...], after: tuple[str, ...], of: str, **options: Any) -> Job:
        models = None if of == SHIPPED else asked.out / of
        return study_job(asked, name, parts, after, output=files[of], models=models, **options)

    for name, parts in PAIR_PARTS.items():
        possible = tuple(part for part in parts if held_out is not None or part not in NEED_TEXT)
        jobs.append(measured(f"{SHIPPED} {name}", possible, (), SHIPPED, data=held_out))
    if FAMILY in families:
        jobs.append(measured(FAMILY, FAMILY_PARTS, trained[FAMILY], FAMILY, data=held_out))
        if families[FAMILY].shipped:  # the search of the pair tells what the measures must predict
            extra: dict[str, Any] = {"with": files[SHIPPED]}
            before, parts = (*trained[FAMILY], f"{SHIPPED} search"), ("measures", "prediction")
        else:
            extra, before, parts = {}, trained[FAMILY], ("path", "measures", "search", "prediction")
        jobs.append(measured(f"{FAMILY} measures", parts, before, FAMILY, data=held_out, **extra))
    if WIDE in families:
        jobs.append(measured(WIDE, WIDE_PARTS, trained[WIDE], WIDE, data=held_out))
    if SECOND in families:
        folder = asked.out / SECOND
        second: dict[str, Any] = {"length": size.second_length, "judge": folder / "judge"}
        jobs.append(measured(SECOND, SECOND_PARTS, trained[SECOND], SECOND, data=folder / "held-out.txt", **second))
    return jobs, list(families.values())


def family_of(out: Path, data: list[Path], *options: str) -> argparse.Namespace:
    return train.build_parser().parse_args(["--out", str(out), "--data", *map(str, data), *options])


def keep_evaluations(family: Path, results: Path) -> None:
    """Put the ends of a family's training runs beside those that are in the results."""
    new = json.loads((family / "family.json").read_text())
    path = results / f"study-{family.name}-training.json"
    old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"held_out": {}}
    write_whole(path, json.dumps(new | {"held_out": old["held_out"] | new["held_out"]}, indent=1) + "\n")


def main(arguments: list[str] | None = None, say: Callable[[str], None] = lambda line: print(line, flush=True)) -> int:
    """Run what is not there yet. The exit code is 1 if something is missing at the end."""
    parser = build_parser()
    asked = parser.parse_args(arguments)
    if not asked.data and (asked.held_out or asked.wide):
        parser.error("--held-out and --wide are about models that are trained on --data: give it")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (asked.out / "work").mkdir(parents=True, exist_ok=True)
    try:
        jobs, families = jobs_of(asked)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if asked.list:
        for job in jobs:
            state = "done" if job.result.exists() else f"after {', '.join(job.after)}" if job.after else "first"
            say(f"{job.name}: {state}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the jobs are stopped, too
    try:
        missing = run_jobs(jobs, asked.devices or train.all_devices(), say)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from there")
        return 1
    for family in families:
        train.describe(family)
        keep_evaluations(family.out, asked.results or (RESULTS if asked.size == "full" else asked.out))
    say(f"{asked.out}: " + (f"not finished: {', '.join(missing)}" if missing else "complete"))
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
