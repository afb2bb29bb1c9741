"""Which parts of the study are run, in which order, and the file that they are kept in."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import seconds, write_text_whole
from benchmarks.study import fitted, likelihoods, quality, routing
from benchmarks.study.setting import JUDGING, Part, Study, events
from mdkern import sample

# The order in which they are run: what others need, and what most depends on, first.
ORDER = (
    "path",
    "measures",
    "search",
    "prediction",
    "fitted",
    "hand_made",
    "shares",
    "decoders",
    "routing",
    "prompted",
    "yardstick",
    "order",
    "bounds",
    "light_size",
    "three_models",
)
PARTS: dict[str, Part] = {
    name: (quality.PARTS | fitted.PARTS | likelihoods.PARTS | routing.PARTS)[name] for name in ORDER
}
BY_MODEL = "models", "blocks"  # settings with an entry for each model
Say = Callable[[str], None]


class Record:
    """The study's file: its setting, and each part with its machine, its seconds and its expected passes."""

    def __init__(self, path: Path, study: Study, other: Path | None = None) -> None:
        """Begin a file, or go on with one of the same setting; parts that are there become `Study.found`.

        Args:
            other: the file of a study of the same pair, for parts that others need and that this file does not have.

        Raises:
            ValueError: a file is of another study.
        """
        self.path, self.study, self.setting = path, study, study.setting()
        self.parts: dict[str, Any] = {}
        self.others = {} if other is None else self.read(other)["parts"]
        path.parent.mkdir(parents=True, exist_ok=True)
        study.search_file = path.with_name(f"{path.stem}-search.jsonl")
        self.refresh()

    def refresh(self) -> None:
        """Take what is in the file by now: several processes may each run some of the parts.

        Raises:
            ValueError: the file is of another study.
        """
        if self.path.exists():
            content = self.read(self.path)
            # Text and models may come later, or not be at hand any more.
            known = {key: value for key, value in content["setting"].items() if value is not None}
            self.setting |= known | {name: self.setting[name] | known[name] for name in BY_MODEL}
            self.parts = content["parts"]
        self.study.found = {name: part["found"] for name, part in (self.others | self.parts).items()}

    def read(self, path: Path) -> dict[str, Any]:
        """A file of results. Raises ValueError if it is of another study."""
        if not path.is_file():
            raise ValueError(f"{path} is not there")
        content: dict[str, Any] = json.loads(path.read_text())
        known, mine = content["setting"], self.setting
        both = [key for key in known if known[key] is not None and mine.get(key) is not None]
        differing = [key for key in both if not agree(key, known[key], mine[key])]
        if differing:
            raise ValueError(f"{path} is of another study (it differs in {', '.join(differing)}): give another file")
        return content

    def keep(self, name: str, found: dict[str, Any], took: float, passes: float) -> None:
        """Write a part beside those that are there, the file whole or not at all."""
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.refresh()
            self.parts[name] = {
                "environment": self.study.environment(),
                "seconds": took,
                "heavy_passes": passes,
                "found": found,
            }
            self.study.found[name] = found
            parts = {name: self.parts[name] for name in PARTS if name in self.parts}
            write_text_whole(self.path, json.dumps({"setting": self.setting, "parts": parts}, indent=1) + "\n")


def agree(key: str, known: Any, mine: Any) -> bool:
    """Whether a setting is the same in two studies: of models, that of those which both have."""
    if key in BY_MODEL:
        return all(known[name] == mine[name] for name in known.keys() & mine.keys())
    return bool(known == mine)


class Budget:
    """Seconds that are left, and what a heavy pass takes: as calibrated first, then as the large parts have taken."""

    def __init__(self, most: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most, self.clock, self.began = most, clock, clock()
        self.spent = self.passes = self.small = 0.0

    def add(self, took: float, passes: float) -> None:
        """Count a run, the first one and those of ten times its passes: in small ones compiling counts for too much."""
        if passes > self.small:
            self.small = self.small or 10 * passes
            self.spent, self.passes = self.spent + took, self.passes + passes

    def predicted(self, passes: float) -> float:
        return passes * self.spent / self.passes if self.passes else 0.0

    def left(self) -> float:
        return float("inf") if self.most is None else self.most - (self.clock() - self.began)


def run_parts(
    record: Record,
    names: Sequence[str] = ORDER,
    budget: Budget | None = None,
    again: bool = False,
    say: Say = print,
) -> dict[str, str]:
    """Run the parts that are not there yet, or lack a model that is, and keep each as soon as it is measured.

    Args:
        names: of `PARTS`; they are run in the order of `PARTS`.
        budget: of seconds. Default: as many as it takes.
        again: measure parts anew that are there.

    Returns:
        The parts that were asked for and not run, with the reason.
    """
    study, left_out = record.study, dict[str, str]()
    budget = Budget(None) if budget is None else budget
    for name in in_order(names):
        record.refresh()
        if name in record.parts and not again:
            if PARTS[name].whole(study, record.parts[name]["found"]):
                say(f"{name}: there already")
                continue
            say(f"{name}: there, without a model that has come since")
        reason = lacking(name, study) or waiting(name, study)
        passes = 0.0 if reason else PARTS[name].passes(study)
        reason = reason or too_long(budget, passes)
        if reason is not None:
            left_out[name] = reason
            say(f"{name}: not run: {reason}")
            continue
        say(f"{name}: about {passes:,.0f} heavy passes, {budget.predicted(passes):.0f} s")
        took, found = seconds(partial(PARTS[name].run, study), study.device.type)
        record.keep(name, found, took, passes)
        budget.add(took, passes)
        say(f"{name}: {took:.1f} s")
    return left_out


def in_order(names: Iterable[str]) -> list[str]:
    """Known names in the order of `PARTS`.

    Raises:
        ValueError: a name that is no part's.
    """
    unknown = set(names) - set(PARTS)
    if unknown:
        raise ValueError(f"no such part: {', '.join(sorted(unknown))} (there are {', '.join(PARTS)})")
    return [name for name in PARTS if name in set(names)]


def lacking(name: str, study: Study) -> str | None:
    """What a part cannot be run without in this study, or None."""
    if PARTS[name].text and study.text is None:
        return "it needs held-out text: give --data"
    if PARTS[name].between and not study.between:
        return "it needs models between light and heavy: give --models"
    return None


def waiting(name: str, study: Study) -> str | None:
    """Which parts must be run before, or None."""
    missing = [other for other in PARTS[name].needs if other not in study.found]
    return f"it needs {', '.join(missing)} first" if missing else None


def too_long(budget: Budget, passes: float) -> str | None:
    expected, left = budget.predicted(passes), budget.left()
    return f"it takes about {expected:.0f} s, and {max(0.0, left):.0f} s are left" if expected > left else None


def calibrate(study: Study, budget: Budget) -> None:
    """Time a batch of the heavy model and its judging, once it is warm, so that the first part has a prediction."""
    size = study.size
    options: dict[str, Any] = {"num_samples": size.batch_size, "batch_size": size.batch_size, "length": size.length}

    def run() -> None:
        out = sample(study.pair["H"], steps=size.steps(), seed=study.seed, progress=False, **options)
        assert out.sequences is not None
        study.score(out.sequences)

    run()
    took, _ = seconds(run, study.device.type)
    budget.add(took, size.batch_size * (events(size.steps(), size.length) + JUDGING))
