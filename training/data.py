"""Text to token files: a byte-level BPE, a streaming tokenizer, and compressed copies for transport.

    python -m training.data bpe --vocab-size 4096 --out tokenizer/ books.txt.xz ...
    python -m training.data tokenize --tokenizer tokenizer/ --out train.bin books.txt.xz ...
    python -m training.data tokenize --tokenizer gpt2/ --out owt.bin openwebtext "lm1b:train[:10%]"
    python -m training.data pack --out packed/ train.bin
    python -m training.data unpack --out data/ packed/train.bin.xz

A source is a text file, plain or .xz: one paragraph a line, documents separated by a line `<|endoftext|>`; or the
name of a data set of the optional `datasets` library, with an optional split after a colon. A token file is a flat
array of uint16 or uint32 (NAME.bin) and its description (NAME.json): paragraphs of a document joined by "\\n", every
document followed by the end-of-text token. All files are written atomically.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import lzma
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mdkern.files import open_text, replacing, write_whole

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
DATASETS = {"openwebtext": "Skylion007/openwebtext", "lm1b": "billion-word-benchmark/lm1b"}
PARQUET = "refs/convert/parquet"  # both are script data sets, which `datasets` >= 4 loads from this branch only
BATCH_CHARS = 1 << 22  # text encoded at once; bounds memory at a few hundred MB
SAMPLE_CHARS = 1 << 20
LONGEST_LINE = 1 << 24  # characters


@dataclass(frozen=True)
class TokenFileInfo:
    """The description of a token file, which is NAME.json beside NAME.bin."""

    dtype: str
    count: int
    vocab_size: int
    eos_id: int
    mask_id: int
    tokenizer_sha256: str
    sha256: str
    text_bytes: int
    sources: list[str]


# ---------------------------------------------------------------------------------------------------- reading text


def paragraphs(source: str) -> Iterator[str | None]:
    """Yield the paragraphs of a source, without line ends, and None after each document.

    Raises FileNotFoundError if the source is neither a file nor a known data set, ImportError without `datasets`, and
    ValueError on a line of more than `LONGEST_LINE` characters and on a damaged file.
    """
    name, _, split = source.partition(":")
    if name in DATASETS and not Path(source).exists():
        yield from _dataset_paragraphs(name, split or "train")
        return
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no such text file: {source} (known data sets: {', '.join(DATASETS)})")
    open_document = False
    with open_text(path) as file:
        while line := str(file.readline(LONGEST_LINE + 1)):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path} has a line of more than {LONGEST_LINE} characters: break it (fold -s)")
            paragraph = line.removesuffix("\n")
            if paragraph != END_OF_TEXT:
                open_document = True
                yield paragraph
            elif open_document:
                open_document = False
                yield None
    if open_document:
        yield None


def _dataset_paragraphs(name: str, split: str) -> Iterator[str | None]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(f"data set {name!r} needs the `datasets` library: pip install 'mdkern[train]'") from error
    for record in datasets.load_dataset(DATASETS[name], split=split, revision=PARQUET):
        yield from record["text"].split("\n")
        yield None


def documents_text(sources: Sequence[str]) -> Iterator[str | None]:
    """The paragraphs of all sources, every one but a document's first with a leading newline; None ends a document."""
    first = True
    for item in itertools.chain.from_iterable(map(paragraphs, sources)):
        yield item if item is None or first else "\n" + item
        first = item is None


# ------------------------------------------------------------------------------------------------------ tokenizers


def train_bpe(sources: Sequence[str], vocab_size: int, out: Path, sample_every: int = 1, at_most: bool = False) -> None:
    """Train a byte-level BPE and save it as tokenizer.json and tokenizer_config.json in `out`.

    Args:
        sources: text files or data set names.
        vocab_size: entries in all; id 0 is the end of text, the last id the mask.
        out: folder that `transformers.PreTrainedTokenizerFast.from_pretrained` loads afterwards.
        sample_every: learn merges from every n-th MB of text only.
        at_most: take fewer entries if the text has too few distinct pairs for so many; else that is a ValueError.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if sample_every < 1:
        raise ValueError(f"sample_every must be at least 1, got {sample_every}")
    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes and two specials), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_every_nth_megabyte(sources, sample_every), trainer)
    tokenizer.add_special_tokens([MASK])
    if tokenizer.get_vocab_size() != vocab_size and not at_most:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} entries only, not {vocab_size}: give more text")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "tokenizer_config.json", json.dumps(config, indent=2))
    write_whole(out / "tokenizer.json", tokenizer.to_str())


def _every_nth_megabyte(sources: Sequence[str], every: int) -> Iterator[str]:
    chars = 0
    for text in documents_text(sources):
        if text is not None:
            if chars // SAMPLE_CHARS % every == 0:
                yield text
            chars += len(text)


@dataclass(frozen=True)
class TextEncoder:
    """A fast tokenizer reduced to what a token file needs. `vocab_size` counts the mask."""

    backend: Any  # tokenizers.Tokenizer
    vocab_size: int
    eos_id: int
    mask_id: int
    sha256: str

    @classmethod
    def load(cls, folder: Path) -> TextEncoder:
        """Load a transformers tokenizer folder. A tokenizer without a mask gets the id after its last one.

        Raises FileNotFoundError without tokenizer.json, ValueError without an end-of-text token.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json: save the fast tokenizer with save_pretrained")
        content = path.read_text(encoding="utf-8")
        backend = Tokenizer.from_str(content)
        backend.encode_special_tokens = True  # the name of a special token inside a text is plain text
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text()) if config_path.is_file() else {}
        ids = {key: backend.token_to_id(_token_text(config.get(key)) or name)
               for key, name in (("eos_token", END_OF_TEXT), ("mask_token", MASK))}  # fmt: skip
        if ids["eos_token"] is None:
            raise ValueError(f"{folder}: no end-of-text token (eos_token in tokenizer_config.json)")
        size = backend.get_vocab_size()
        mask_id = size if ids["mask_token"] is None else ids["mask_token"]
        digest = hashlib.sha256(content.encode()).hexdigest()
        return cls(backend, max(size, mask_id + 1), ids["eos_token"], mask_id, digest)

    def encode(self, items: list[str | None]) -> list[int]:
        """Token ids of consecutive texts, None standing for the end of a document."""
        encoded = iter(self.backend.encode_batch_fast([t for t in items if t is not None], add_special_tokens=False))
        return [i for item in items for i in ([self.eos_id] if item is None else next(encoded).ids)]


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


# ----------------------------------------------------------------------------------------------------- token files


def tokenize(sources: Sequence[str], tokenizer: Path, out: Path, max_tokens: int | None = None) -> TokenFileInfo:
    """Write the token file `out` (.bin, uint16 or uint32) and its description beside it, in bounded memory."""
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    encoder = TextEncoder.load(tokenizer)
    dtype = np.dtype(np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32)
    digest, count, text_bytes = hashlib.sha256(), 0, 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file, tqdm(unit="tok", unit_scale=True, disable=None) as bar:
        for items in _batches(documents_text(sources)):
            encoded = np.array(encoder.encode(items), dtype=dtype)
            ids = encoded if max_tokens is None else encoded[: max_tokens - count]
            file.write(ids.data)
            digest.update(ids.data)
            count += len(ids)
            batch_bytes = sum(len(item.encode()) for item in items if item is not None)
            text_bytes += batch_bytes * len(ids) // max(len(encoded), 1)
            bar.update(len(ids))
            if count == max_tokens:
                break
    info = TokenFileInfo(dtype.name, count, encoder.vocab_size, encoder.eos_id, encoder.mask_id, encoder.sha256,
                         digest.hexdigest(), text_bytes, [Path(s).name for s in sources])  # fmt: skip
    write_info(out, info)
    log.info("%s: %d tokens, %.3f bytes of text a token", out, count, text_bytes / max(count, 1))
    return info


def _batches(items: Iterator[str | None]) -> Iterator[list[str | None]]:
    batch: list[str | None] = []
    chars = 0
    for item in items:
        batch.append(item)
        chars += len(item or "") + 1  # empty documents take memory, too
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def write_info(path: Path, info: TokenFileInfo) -> None:
    write_whole(path.with_suffix(".json"), json.dumps(asdict(info), indent=2))


def read_info(path: Path) -> TokenFileInfo:
    """Read a token file's description. Raises FileNotFoundError with what to do."""
    if not path.with_suffix(".json").is_file():
        raise FileNotFoundError(
            f"{path} is no token file, as there is no {path.with_suffix('.json')} beside it: make one with"
            " `python -m training.data tokenize`"
        )
    return TokenFileInfo(**json.loads(path.with_suffix(".json").read_text()))


def open_pair(train: Path, valid: Path) -> list[tuple[np.ndarray, TokenFileInfo]]:
    """Two token files, see `open_tokens`. Raises ValueError also if their tokenizers differ."""
    pair = [open_tokens(train), open_tokens(valid)]
    if len({info.tokenizer_sha256 for _, info in pair}) > 1:
        raise ValueError(f"{train} and {valid} were made with different tokenizers")
    return pair


def open_tokens(path: Path) -> tuple[np.ndarray, TokenFileInfo]:
    """Map a token file: (tokens [count] uint16 or uint32, read-only, its description).

    Raises FileNotFoundError if either file is missing, ValueError if the size is not the described one or 0.
    """
    info = read_info(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such token file: {path}")
    if path.stat().st_size != info.count * np.dtype(info.dtype).itemsize:
        raise ValueError(f"{path} does not hold the {info.count} tokens of its description: make it again")
    if not info.count:
        raise ValueError(f"{path} has no tokens: there was no text to make it of")
    return np.memmap(path, dtype=info.dtype, mode="r"), info


def pack(path: Path, out: Path) -> Path:
    """Compress a token file to out/NAME.bin.xz, its description beside it."""
    # lp = pb = 1 aligns the literal and position bits with two-byte tokens (docs/notes/training.md).
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26, "lc": 3, "lp": 1, "pb": 1}]
    info = read_info(path)
    packed = out / f"{path.name}.xz"
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(path, "rb") as source,
        replacing(packed) as file,
        lzma.LZMAFile(file, "wb", format=lzma.FORMAT_XZ, filters=filters) as compressed,
    ):
        shutil.copyfileobj(source, compressed, 1 << 20)
    write_info(out / path.name, info)
    return packed


def unpack(packed: Path, out: Path) -> Path:
    """Undo `pack`. Raises ValueError if the tokens are not the packed ones."""
    path = out / packed.name.removesuffix(".xz")
    info = read_info(packed.with_suffix(""))
    digest, size = hashlib.sha256(), 0
    described = info.count * np.dtype(info.dtype).itemsize
    out.mkdir(parents=True, exist_ok=True)
    with lzma.open(packed, "rb") as source, replacing(path) as file:
        try:
            while block := source.read(1 << 20):
                size += len(block)
                if size > described:
                    raise ValueError(f"{packed} holds more than the {described} bytes of its description")
                digest.update(block)
                file.write(block)
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{packed} is damaged or cut short: {error}") from error
        if digest.hexdigest() != info.sha256:
            raise ValueError(f"{packed} is damaged: its tokens do not have the described checksum")
    write_info(path, info)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    bpe = commands.add_parser("bpe", help="train a byte-level BPE")
    bpe.add_argument("--vocab-size", type=int, required=True)
    bpe.add_argument("--sample-every", type=int, default=1, help="learn from every n-th MB of text")
    tok = commands.add_parser("tokenize", help="text to a token file")
    tok.add_argument("--tokenizer", type=Path, required=True)
    tok.add_argument("--max-tokens", type=int, help="stop after so many tokens")
    for command in (bpe, tok):
        command.add_argument("sources", nargs="+")
    for name, text in (("pack", "compress token files"), ("unpack", "undo pack")):
        commands.add_parser(name, help=text).add_argument("files", nargs="+", type=Path)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.command == "bpe":
            train_bpe(args.sources, args.vocab_size, args.out, args.sample_every)
        elif args.command == "tokenize":
            tokenize(args.sources, args.tokenizer, args.out, args.max_tokens)
        else:
            with ProcessPoolExecutor() as pool:
                done = pool.map(pack if args.command == "pack" else unpack, args.files, [args.out] * len(args.files))
                for path in done:
                    log.info("%s (%d bytes)", path, path.stat().st_size)
    except (ValueError, OSError, ImportError) as error:  # OSError: a full disk or a circle of links
        parser.error(str(error))


if __name__ == "__main__":
    main()
