"""``--output``: samples as JSON lines, which are written to ``FILE.partial`` and moved to ``FILE`` at the end.

The first line of the partial file describes the request, so that ``--resume`` continues no other one. Then comes a line
for each sample in the order in which they were finished.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mdkern.files import create, named_errors, real_path, replacing


class SampleFile:
    """The samples of one request, some of which may have been finished by an earlier run."""

    def __init__(self, target: Path, request: Mapping[str, Any], seed: int) -> None:
        """Begin a file, or continue with what an interrupted run has left.

        Args:
            target: the file to be written in the end.
            request: everything that the samples depend on, except the seed, as values for JSON.
            seed: seed of a new run; a resumed run keeps its own.

        Raises:
            ValueError: the partial file belongs to another request, or is not ours.
        """
        self.target = real_path(target)
        self.path = partial_path(target)
        self.places: dict[int, tuple[int, int]] = {}  # beginning and end of each sample's line, by sample number
        there = self.path.exists()
        self.file: BinaryIO = self.path.open("r+b") if there else create(self.path, self.target)
        self.lock()
        if there:
            self.go_on(request)
        if not self.places:
            self.seed = seed
            self.file.seek(0)
            self.file.truncate()
            self.append({"request": dict(request), "seed": seed})

    def lock(self) -> None:
        """Keep other processes away until the file is closed."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is being written by another process") from None

    def go_on(self, request: Mapping[str, Any]) -> None:
        """Read the finished samples. A last line that was cut off is dropped."""
        try:
            lines = iter(self.file)
            first = next(lines)
            begun = json.loads(first)
            theirs, self.seed = begun["request"], int(begun["seed"])
        except (StopIteration, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} is not what an interrupted run leaves: delete it") from None
        end = len(first)
        for line in lines:
            try:
                number = json.loads(line)["sample"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                number = None
            if not isinstance(number, int):
                break
            self.places[number] = end, end + len(line)
            end += len(line)
        ours = json.loads(json.dumps(request))
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if differing and self.places:
            raise ValueError(
                f"--resume: {self.path} was begun with other settings ({', '.join(differing)}): ask for the same, or "
                "delete it to begin anew"
            )
        self.file.seek(end)
        self.file.truncate()

    def append(self, *values: Mapping[str, Any]) -> None:
        """Write lines, and make sure that they are on the disk."""
        with named_errors(self.path):
            end, places = self.file.tell(), {}
            for value in values:
                line = json.dumps(value).encode() + b"\n"
                self.file.write(line)
                places[value.get("sample")] = end, end + len(line)
                end += len(line)
            self.file.flush()
            os.fsync(self.file.fileno())
        self.places |= {number: place for number, place in places.items() if number is not None}

    def finish(self, numbers: Iterable[int]) -> None:
        """Write the final file with the samples of these numbers, in order."""
        with replacing(self.target) as whole:
            for number in numbers:
                begin, end = self.places[number]
                self.file.seek(begin)
                whole.write(self.file.read(end - begin))
        self.file.close()
        self.path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """After an error, keep the finished samples and add a note to the error that says where; keep no empty file."""
        if error is None:
            return
        with suppress(OSError):  # this may be the error that is being handled
            self.file.close()
        count = len(self.places)
        if count:
            are = "sample is" if count == 1 else "samples are"
            error.add_note(f"{count} finished {are} in {self.path}, from which --resume goes on")
        else:
            self.path.unlink(missing_ok=True)


def partial_path(target: Path) -> Path:
    path = real_path(target)
    return path.with_name(f"{path.name}.partial")


def holds_samples(partial: Path) -> bool:
    """Whether a partial file has more than its first line."""
    if not partial.exists():
        return False
    with partial.open("rb") as file:
        file.readline()
        return bool(file.readline())
