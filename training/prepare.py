"""Prepares a text file for training: trains a tokenizer on it, and tokenizes it with the last part held out."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from mdkern.files import replacing, write_whole
from training.data import TokenFileInfo, open_tokens, tokenize, train_bpe, write_info

log = logging.getLogger(__name__)

HELD_OUT = 0.05
SOURCE_FILE = "source.json"


def prepare_text(text: Path, out: Path, tokenizer: Path | None = None) -> tuple[Path, Path, Path]:
    """Token files of a text's first 95 % and last 5 %, and the folder of their tokenizer, all in `out`.

    Args:
        text: a text file, plain or .xz, as `training.data` reads it.
        tokenizer: a tokenizer's folder; None: one is trained on the text.

    Files that an earlier call made from the same text are used again.
    """
    if not text.is_file():
        raise FileNotFoundError(f"no such file: {text}")
    train, valid, folder = out / "train.bin", out / "valid.bin", out / "tokenizer"
    with open(text, "rb") as file:
        source = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "tokenizer": str(tokenizer or "")}
    made = out / SOURCE_FILE
    if made.is_file() and json.loads(made.read_text()) == source:
        return train, valid, folder
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    else:
        train_fitting_bpe(text, folder)
    whole = out / "whole.bin"
    tokenize([str(text)], folder, whole)
    tokens, info = open_tokens(whole)
    cut = len(tokens) - max(1, int(HELD_OUT * len(tokens)))
    for path, part in ((train, tokens[:cut]), (valid, tokens[cut:])):
        write_part(path, part, info)
    whole.unlink()
    whole.with_suffix(".json").unlink()
    write_whole(made, json.dumps(source))
    log.info("%s: %d tokens to train on, %d held out", text, cut, len(tokens) - cut)
    return train, valid, folder


def train_fitting_bpe(text: Path, folder: Path) -> None:
    """Train a BPE of about one id for 200 bytes, a power of two from 512 to 4096, or fewer if the text yields fewer."""
    size = text.stat().st_size * (4 if text.suffix == ".xz" else 1)
    ids = min(max(size // 200, 512), 4096)
    rounded = 1 << (ids.bit_length() - 1)
    train_bpe([str(text)], rounded, folder, sample_every=max(1, size // (64 << 20)), at_most=True)


def write_part(path: Path, tokens: np.ndarray, info: TokenFileInfo) -> None:
    share = len(tokens) / info.count
    with replacing(path) as file:
        file.write(tokens.tobytes())
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    write_info(path, replace(info, count=len(tokens), sha256=digest, text_bytes=round(share * info.text_bytes)))
