"""Texts for a family of models: which documents are trained on, judged by and held out, as token files."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdkern.files import write_whole
from training.data import END_OF_TEXT, paragraphs, tokenize, train_bpe

log = logging.getLogger(__name__)

FEW = 30  # documents
HELD_OUT = 0.03  # of the documents, where no text is given for it
MADE_FROM = "made-from.json"


@dataclass(frozen=True)
class Texts:
    """Token files, and what they were made with."""

    train: Path
    valid: Path
    judge: Path | None
    tokenizer: Path


def prepare_texts(
    data: Sequence[Path],
    out: Path,
    held_out: Path | None = None,
    judge: bool = False,
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
) -> Texts:
    """Token files of texts, in ``out/work``; ``out/tokenizer``; and ``out/held-out.txt`` if that is split off.

    Args:
        data: text files, plain or .xz, as `training.data` reads them.
        held_out: a text that no model is trained on. None: the last documents of `data`.
        judge: keep every second document for a judge.
        tokenizer: a tokenizer's folder. None: a byte-level BPE of `vocab_size` ids is trained on the models' text.

    Files that an earlier call made from the same texts are used again.

    Raises:
        FileNotFoundError: a text that is not there.
        ValueError: too few documents to share out, or a text that `training.data` refuses.
    """
    work = out / "work"
    made = Texts(work / "train.bin", work / "valid.bin", work / "judge.bin" if judge else None, out / "tokenizer")
    given = [*data, *([] if held_out is None else [held_out])]
    source = {
        "texts": [digest_of(path) for path in given],
        "held_out": held_out is not None,
        "judge": judge,
        "tokenizer": str(vocab_size) if tokenizer is None else digest_of(tokenizer / "tokenizer.json"),
    }
    if (work / MADE_FROM).is_file() and json.loads((work / MADE_FROM).read_text()) == source:
        return made
    work.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [str(path) for path in data]}
    if held_out is None or judge:
        parts = deal(data, work, out / "held-out.txt" if held_out is None else None, judge)
    parts["valid"] = [str(out / "held-out.txt" if held_out is None else held_out)]
    if tokenizer is None:
        train_bpe(parts["train"], vocab_size, made.tokenizer, at_most=True)
    else:
        shutil.copytree(tokenizer, made.tokenizer, dirs_exist_ok=True)
    for name, sources in parts.items():
        tokenize(sources, made.tokenizer, work / f"{name}.bin")
    write_whole(work / MADE_FROM, json.dumps(source))
    return made


def deal(data: Sequence[Path], work: Path, held_out: Path | None, judge: bool) -> dict[str, list[str]]:
    """Share out the documents of texts: the last ones to `held_out`, of the rest every second one to the judge.

    If there are fewer than `FEW` documents, as in a book, paragraphs are shared out instead.

    Returns the text files of the models' part, and of the judge's if there is one.
    """
    documents = [document for path in data for document in documents_of(path)]
    if len(documents) < FEW:
        documents = [paragraph for document in documents for paragraph in document.split("\n") if paragraph]
    kept = len(documents) - (max(1, round(HELD_OUT * len(documents))) if held_out is not None else 0)
    share = 2 if judge else 1
    if kept < share:
        raise ValueError(f"{len(documents)} paragraphs are too few to share out: give --held-out, or a longer text")
    if held_out is not None:
        write_documents(held_out, documents[kept:])
    found: dict[str, list[str]] = {}
    for number, name in enumerate(("train", "judge")[:share]):
        path = work / f"{name}.txt"
        write_documents(path, documents[number:kept:share])
        found[name] = [str(path)]
    return found


def documents_of(path: Path) -> list[str]:
    found, lines = list[str](), list[str]()
    for item in paragraphs(str(path)):
        if item is None:
            found.append("\n".join(lines))
            lines = []
        else:
            lines.append(item)
    return found


def write_documents(path: Path, documents: Sequence[str]) -> None:
    write_whole(path, f"\n{END_OF_TEXT}\n".join(documents) + "\n")


def digest_of(path: Path) -> str:
    """SHA-256 of a file. Raises FileNotFoundError in a sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_count(path: Path) -> int:
    described: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return int(described["count"])
