"""Files that are written whole or not at all, and are as private as those that they replace."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def real_path(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to, links followed, whether or not it is there.

    Raises:
        ValueError: links that lead in a circle.
    """
    try:
        target = Path(path).resolve()
    except RuntimeError:  # of Python before 3.13
        target = Path(path)
    if target.is_symlink():
        raise ValueError(f"{path} is a link that leads in a circle")
    return target


def create(path: Path, like: Path) -> BinaryIO:
    """A new file, open for writing, with the permissions of the file `like` if that is there."""
    mode = stat.S_IMODE(like.stat().st_mode) if like.exists() else None
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    if mode is not None:
        os.fchmod(number, mode)
    return os.fdopen(number, "w+b")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """System errors that name no file, as those of a full disk, with the file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends; if that fails, nothing has changed.

    A link stays a link, and permissions stay as they were.
    """
    target = real_path(path)
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    staging.unlink(missing_ok=True)
    try:
        with named_errors(target):
            with create(staging, target) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())
