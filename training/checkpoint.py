"""Checkpoints that are either complete or absent, with a checksum, and exact resumption."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from mdkern.digest import digest
from mdkern.files import replacing, write_whole

log = logging.getLogger(__name__)

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
CHECKSUM = "sha256"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the folder's checkpoint, keeping the previous one. A crash at any point leaves a usable one.

    It includes a checksum of its content, under the name `CHECKSUM`.
    """
    with replacing(folder / CURRENT) as file:
        torch.save(state | {CHECKSUM: digest(state)}, file)
        if (folder / CURRENT).exists():
            link = folder / ".checkpoint.link"
            link.unlink(missing_ok=True)
            os.link(folder / CURRENT, link)  # so that the current name never goes missing
            os.replace(link, folder / PREVIOUS)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The folder's checkpoint on the CPU, or the previous one if it is damaged, or None if there is none.

    Raises ValueError if there are checkpoints but all are damaged.
    """
    paths = [folder / name for name in (CURRENT, PREVIOUS) if os.path.lexists(folder / name)]
    for path in paths:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if state.pop(CHECKSUM, None) != digest(state):
                raise ValueError("its checksum is not that of what it holds")
            return state
        except Exception as error:  # a damaged file may raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("%s cannot be read (%s)", path, reason)
    if paths:
        raise ValueError(f"no checkpoint in {folder} can be read: remove them to start again")
    return None


def saved_config(folder: Path) -> dict[str, Any]:
    """The settings of the folder's checkpoint without its weights; none if there is no readable one."""
    try:
        config = torch.load(folder / CURRENT, map_location="cpu", weights_only=True, mmap=True)["config"]
    except Exception:  # the error is reported when the checkpoint is loaded
        return {}
    return config if isinstance(config, dict) else {}


def check_same_config(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise ValueError naming every setting in which a run differs from its checkpoint."""
    keys = sorted(saved.keys() | wanted.keys())
    differing = [f"{k}: {saved.get(k)!r} there, {wanted.get(k)!r} here" for k in keys if saved.get(k) != wanted.get(k)]
    if differing:
        raise ValueError(f"the checkpoint in {folder} is of another run ({'; '.join(differing)}): use another --out")


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a log that have a step and its loss, and their content; damaged lines are left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("loss"), int | float):
            records.append((line, record))
    return records


class JsonLines:
    """A log of one JSON object a line, each with a `step`; cut back to the checkpoint's step on resumption."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Keep the lines with ``step <= last_step`` and append after them."""
        write_whole(path, "".join(f"{line}\n" for line, record in read_records(path) if record["step"] <= last_step))
        self.file = open(path, "a")  # noqa: SIM115 - held for the run's length

    def write(self, records: list[dict[str, Any]]) -> None:
        self.file.writelines(json.dumps(record) + "\n" for record in records)
        self.file.flush()

    def close(self) -> None:
        self.file.close()
