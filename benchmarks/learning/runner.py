"""The file of results: a setting, and by seed the parts that have been run. Several processes may fill it."""

from __future__ import annotations

import fcntl
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, host_environment, write_text_whole
from benchmarks.learning.setting import Study
from benchmarks.learning.stages import PARTS

Say = Callable[[str], None]


class Record:
    """The parts of one seed in the file of all."""

    def __init__(self, path: Path, study: Study) -> None:
        """Begin a file, or go on with one of the same setting.

        Raises:
            ValueError: the file has another setting.
        """
        self.path, self.study = path, study
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.content()

    def content(self) -> dict[str, Any]:
        setting = json.loads(json.dumps(self.study.setting()))
        if not self.path.exists():
            return {"setting": setting, "seeds": {}}
        content: dict[str, Any] = json.loads(self.path.read_text())
        differing = [key for key in setting if content["setting"].get(key) != setting[key]]
        if differing:
            raise ValueError(f"{self.path} has another setting ({', '.join(differing)} differ): give another --output")
        return content

    def parts(self) -> dict[str, Any]:
        """What there is of this seed."""
        found: dict[str, Any] = self.content()["seeds"].get(str(self.study.seed), {})
        return found

    def keep(self, name: str, found: dict[str, Any], took: float) -> None:
        """Write a part beside those that are there, the file whole or not at all."""
        known = environment() if self.study.device.type == "cuda" else host_environment()
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.content()
            parts = content["seeds"].setdefault(str(self.study.seed), {})
            parts[name] = {"environment": known, "seconds": took, "found": found}
            content["seeds"] = dict(sorted(content["seeds"].items()))
            write_text_whole(self.path, json.dumps(content, indent=1) + "\n")


def run_parts(
    record: Record, names: Sequence[str], minutes: float | None = None, again: bool = False, say: Say = print
) -> dict[str, str]:
    """Run the parts that are not there yet, in the order of `PARTS`, and keep each as soon as it is measured.

    A part that fails is reported with its traceback, and those that do not need it are run.

    Args:
        minutes: parts that would end later than that, by what they take on an H200, are left out; None: none is.

    Returns:
        The parts that were not run, with the reason.
    """
    unknown = set(names) - set(PARTS)
    if unknown:
        raise ValueError(f"no such part: {', '.join(sorted(unknown))} (there are {', '.join(PARTS)})")
    began, study, left_out = time.monotonic(), record.study, dict[str, str]()
    for name in (name for name in PARTS if name in names):
        there = record.parts()
        if name in there and not again:
            continue
        missing = [other for other in PARTS[name].needs if other not in there]
        left = float("inf") if minutes is None else 60 * minutes - (time.monotonic() - began)
        if missing:
            left_out[name] = f"it needs {', '.join(missing)} first"
        elif name == "gsm" and study.gsm is None:
            left_out[name] = "it needs --gsm, the folder of the data"
        elif PARTS[name].seconds > left:
            left_out[name] = f"it takes about {PARTS[name].seconds:.0f} s, and {left:.0f} s are left"
        else:
            start = time.monotonic()
            try:
                found = PARTS[name].run(study, {key: part["found"] for key, part in there.items()})
            except Exception:
                say(traceback.format_exc())
                left_out[name] = "it failed"
            else:
                record.keep(name, found, time.monotonic() - start)
        took = f"{time.monotonic() - began:.0f} s so far"
        say(f"seed {study.seed}: {name}: {left_out.get(name, 'done')}, {took}")
    return left_out
