"""Shows text that is being written in any order: redrawn in a terminal, or as far as it is known from the left."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from torch import Tensor

UP, ERASE_BELOW, DIM, PLAIN = "\x1b[{}F", "\x1b[J", "\x1b[2m", "\x1b[0m"
HOLE = "·"  # a token that is still masked


class Display:
    """A stream on which one text at a time is shown while it is being written, and then as it is."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.redraws = stream, stream.isatty() and os.environ.get("TERM") != "dumb"
        self.lines = 0  # of the draft that stands in the terminal
        self.shown = ""  # what was written of the text where it cannot be redrawn
        try:
            HOLE.encode(stream.encoding or "utf-8")
            self.hole = HOLE
        except (UnicodeEncodeError, LookupError):
            self.hole = "_"

    def draft(self, pieces: Sequence[str | None]) -> None:
        """Show a draft: the text of each run of tokens, None for each masked token between them."""
        if not self.redraws:
            self.go_on("".join(beginning(pieces)))
            return
        size = shutil.get_terminal_size()
        text = "".join(self.hole if piece is None else piece for piece in pieces)
        lines = wrapped(text.lstrip(), size.columns)[-max(1, size.lines - 2) :]
        self.erase()
        dimmed = re.sub(f"{self.hole}+", lambda holes: f"{DIM}{holes[0]}{PLAIN}", "\n".join(lines))
        self.stream.write(f"{dimmed}\n")
        self.lines = len(lines)
        self.stream.flush()

    def go_on(self, text: str) -> None:
        """Write what comes after the part of the text that was written already."""
        text = text.rstrip("\ufffd").strip()  # without a character of which only some bytes are there
        if text.startswith(self.shown) and len(text) > len(self.shown):
            self.stream.write(text[len(self.shown) :])
            self.stream.flush()
            self.shown = text

    def finish(self, text: str) -> None:
        """Put the whole text in the place of its drafts."""
        self.erase()
        if self.shown and not text.startswith(self.shown):  # a token that was shown has been changed
            self.stream.write("\n")
            self.shown = ""
        self.stream.write(text[len(self.shown) :] + "\n")
        self.stream.flush()
        self.shown = ""

    def clear(self) -> None:
        """Take the drafts away, or end their line."""
        self.erase()
        if self.shown:
            self.stream.write("\n")
        self.stream.flush()
        self.shown = ""

    def erase(self) -> None:
        if self.lines:
            self.stream.write(UP.format(self.lines) + ERASE_BELOW)
        self.lines = 0


class Drafted:
    """A streamer for `mdkern.sample` that shows the drafts of one text."""

    def __init__(self, display: Display, tokenizer: Any, prompt: int, mask_id: int, eos_ids: Sequence[int]) -> None:
        """`prompt`: number of tokens before the text."""
        self.display, self.tokenizer, self.prompt = display, tokenizer, prompt
        self.mask_id, self.eos_ids = mask_id, set(eos_ids)

    def put_draft(self, ids: Tensor) -> None:
        self.display.draft(self.pieces(ids[0, self.prompt :].tolist()))

    def put(self, ids: Tensor) -> None: ...

    def end(self) -> None: ...

    def pieces(self, ids: Sequence[int]) -> list[str | None]:
        """The text of each run of tokens up to the end of text, None for each mask."""
        pieces: list[str | None] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                pieces.append(self.tokenizer.decode(run, skip_special_tokens=True))
                run.clear()

        for token in ids:
            if token in self.eos_ids:
                break
            if token == self.mask_id:
                flush()
                pieces.append(None)
            else:
                run.append(token)
        flush()
        return pieces


def beginning(pieces: Sequence[str | None]) -> list[str]:
    """The pieces before the first masked token."""
    known: list[str] = []
    for piece in pieces:
        if piece is None:
            break
        known.append(piece)
    return known


def wrapped(text: str, columns: int) -> list[str]:
    """The lines that a terminal of so many columns makes of a text."""
    lines = []
    for line in text.split("\n"):
        row, width = "", 0
        for character in line.expandtabs():
            if not character.isprintable():
                continue
            wide = columns_of(character)
            if width + wide > max(2, columns):
                lines.append(row)
                row, width = "", 0
            row, width = row + character, width + wide
        lines.append(row)
    return lines


def columns_of(character: str) -> int:
    """Columns that a character takes in a terminal."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
