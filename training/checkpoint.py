"""Checkpoints that are either complete or absent, and exact resumption."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from training.data import atomic_open

log = logging.getLogger(__name__)

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the folder's checkpoint, keeping the one before. A crash at any point leaves a usable one."""
    with atomic_open(folder / ".checkpoint.new") as file:
        torch.save(state, file)
    if (folder / CURRENT).exists():
        link = folder / ".checkpoint.link"
        link.unlink(missing_ok=True)
        os.link(folder / CURRENT, link)  # so that the current name never goes missing
        os.replace(link, folder / PREVIOUS)
    os.replace(folder / ".checkpoint.new", folder / CURRENT)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The folder's checkpoint on the CPU, or the one before if it cannot be read, or None if there is none.

    Raises RuntimeError if there are checkpoints and none can be read.
    """
    paths = [folder / name for name in (CURRENT, PREVIOUS) if (folder / name).exists()]
    for path in paths:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read (%s)", path, error)
    if paths:
        raise RuntimeError(f"no checkpoint in {folder} can be read: remove them to start again")
    return None


def check_same_config(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise ValueError naming every setting in which a run differs from its checkpoint."""
    keys = sorted(saved.keys() | wanted.keys())
    differing = [f"{k}: {saved.get(k)!r} there, {wanted.get(k)!r} here" for k in keys if saved.get(k) != wanted.get(k)]
    if differing:
        raise ValueError(f"the checkpoint in {folder} is of another run ({'; '.join(differing)}): use another --out")


class JsonLines:
    """A log of one JSON object a line, each with a `step`; cut back to the checkpoint's step on resumption."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Keep the lines with ``step <= last_step`` and append after them."""
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):  # a line cut short by a crash
                continue
        with atomic_open(path, "w") as file:
            file.writelines(kept)
        self.file = open(path, "a")  # noqa: SIM115 - held for the run's length

    def write(self, records: list[dict[str, Any]]) -> None:
        self.file.writelines(json.dumps(record) + "\n" for record in records)
        self.file.flush()

    def close(self) -> None:
        self.file.close()
