"""Results that are kept in a file as they come, so that an interrupted command goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdkern.digest import digest

__all__ = ["Kept"]


class Kept:
    """A file with a first line for what is measured, and a line for each result; at the end it is removed.

    Results are what JSON can hold.
    """

    def __init__(self, path: Path, setting: Any) -> None:
        """Open a new file, or go on with one of the same setting. A last line that was cut off is dropped.

        Raises:
            ValueError: the file is of another setting, or of something else.
        """
        self.path, self.found = path, dict[str, Any]()
        header = {"setting": digest(setting)}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole:
            try:
                first, *entries = map(json.loads, whole.splitlines())
                self.found = {entry["name"]: entry["value"] for entry in entries}
            except (json.JSONDecodeError, KeyError, TypeError):
                first = None
            if first != header:
                raise ValueError(f"{path} has what another command measured: remove it, or choose another --output")
            os.truncate(path, len(whole.encode()))
        else:
            path.write_text(json.dumps(header) + "\n")

    def get(self, name: str) -> Any:
        """A result, or None."""
        return self.found.get(name)

    def put(self, name: str, value: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, "value": value}) + "\n")
        self.found[name] = value

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A result, measured and kept if it is not there."""
        if name not in self.found:
            self.put(name, measure())
        return self.found[name]

    def remove(self) -> None:
        """Remove the file, once what it held is written elsewhere."""
        self.path.unlink(missing_ok=True)
