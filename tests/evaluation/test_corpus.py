"""Windows of a text file: which tokens they hold, and what is refused."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from mdkern.evaluation import corpus
from mdkern.evaluation.corpus import windows


class Letters:
    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def test_windows_are_whole_spread_evenly_and_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrstuvwxy")  # 25 letters: eight windows of 3, one letter left
    assert windows(path, Letters(), 3, 4).tolist() == [[0, 1, 2], [6, 7, 8], [12, 13, 14], [18, 19, 20]]
    assert windows(path, Letters(), 3, 99).flatten().tolist() == list(range(24))


def test_a_compressed_file_is_read_as_far_as_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt.xz"
    with lzma.open(path, "wt") as file:
        file.write("ab" * 1000)
    monkeypatch.setattr(corpus, "MOST_CHARACTERS", 6)
    assert windows(path, Letters(), 2, 99).tolist() == [[0, 1]] * 3


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    latin, damaged, short = tmp_path / "latin.txt", tmp_path / "damaged.txt.xz", tmp_path / "short.txt"
    latin.write_bytes(b"caf\xe9")
    damaged.write_bytes(lzma.compress(b"text " * 1000)[:-20])
    short.write_text("ab")
    for path, message in (
        (latin, "UTF-8"),
        (damaged, "cut short"),
        (short, "less than one window"),
        (tmp_path, "a file"),
    ):
        with pytest.raises(ValueError, match=message):
            windows(path, Letters(), 3, 1)
    for numbers in ((0, 1), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            windows(short, Letters(), *numbers)
