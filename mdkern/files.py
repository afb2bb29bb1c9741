"""Writes files whole or not at all, with the permissions of the files that they replace."""

from __future__ import annotations

import lzma
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


def real_path(path: str | os.PathLike[str]) -> Path:
    """The path with all links followed, whether or not the file exists.

    Raises:
        ValueError: links that form a circle.
    """
    try:
        target = Path(path).resolve()
    except RuntimeError:  # before Python 3.13
        target = Path(path)
    if target.is_symlink():
        raise ValueError(f"{path} is a link that leads in a circle")
    return target


def create(path: Path, like: Path) -> BinaryIO:
    """A new file, open for writing, with the permissions of the file `like` if that exists."""
    mode = stat.S_IMODE(like.stat().st_mode) if like.exists() else None
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    if mode is not None:
        os.fchmod(number, mode)
    return os.fdopen(number, "w+b")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the file's name to system errors that have none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that replaces `path` when the block ends. If the block fails, nothing is changed.

    If `path` is a link it stays one, and permissions are kept.
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


@contextmanager
def open_text(path: Path) -> Iterator[IO[Any]]:
    """A text file in UTF-8, plain or ``.xz``, open for reading with its line ends as they are.

    Raises:
        ValueError: what is read is not text in UTF-8, or the ``.xz`` is damaged.
    """
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            yield file
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
