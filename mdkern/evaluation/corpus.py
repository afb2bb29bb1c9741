"""Held-out text as windows of tokens, on which models are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdkern.engine.checks import check_count
from mdkern.files import open_text

__all__ = ["windows"]

MOST_CHARACTERS = 1 << 24  # read of a file: some 4 million tokens


def windows(path: str | Path, tokenizer: Any, length: int, count: int) -> Tensor:
    """Up to `count` windows of a text file, spread evenly over it, int64 ``[N, length]``.

    Args:
        path: UTF-8 text, plain or ``.xz``. Of a longer file the first 16 million characters are read.
        tokenizer: of the models.
        length: tokens of a window.
        count: windows at most; windows never overlap, so a short file has fewer.

    Raises:
        ValueError: `length` or `count` below 1, no such file, no UTF-8 text, a damaged ``.xz``, or less text than one
            window.
    """
    check_count("length", length)
    check_count("count", count)
    ids = tokenizer(read_text(Path(path)), add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // length
    if not whole:
        raise ValueError(f"{path} has {len(ids)} tokens, less than one window of {length}")
    chosen = torch.arange(min(count, whole)) * whole // min(count, whole)
    return torch.tensor(ids[: whole * length]).view(whole, length)[chosen]


def read_text(path: Path) -> str:
    """The beginning of a text file, `MOST_CHARACTERS` at most: a small ``.xz`` may hold any amount."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with open_text(path) as file:
        text: str = file.read(MOST_CHARACTERS)
    return text
