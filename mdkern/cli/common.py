"""Shared by the commands: types of arguments, output files, devices, models and their tokenizer."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern.files import real_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mdkern.evaluation.text import JudgedTexts
    from mdkern.models import DiT


LARGEST = 2**31 - 1


def one_line(error: Exception) -> str:
    """An error's message in one line; for a system error, file and reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= LARGEST:
        bound = "at least 1" if value < 1 else f"at most {LARGEST}"
        raise argparse.ArgumentTypeError(f"must be a whole number of {bound}, not {text!r}")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return value


def unicode_text(text: str) -> str:
    """The text, refused if the terminal gave bytes that are no text, such as Latin-1 where UTF-8 is expected."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        raise argparse.ArgumentTypeError(
            f"has bytes that are no text in {encoding}, from character {error.start} on: write it in {encoding}"
        ) from None
    return text


def named_path(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not path or not re.fullmatch(r"[A-Za-z_]+", name):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH with a name of letters, not {text!r}")
    return name.upper(), path


def check_target(option: str, path: Path) -> None:
    """Refuse, before any work, an output file that could not be written or is not a plain file."""
    try:
        target = real_path(path)
        there = os.path.lexists(target)
    except (ValueError, OSError) as error:
        raise ValueError(f"{option} {path} is no file: {one_line(error)}") from None
    if not target.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {target.parent}")
    if there and not target.is_file():
        raise ValueError(f"{option} {path} exists and is not a file")
    if there and not os.access(target, os.W_OK):
        raise ValueError(f"{option} {path} is write-protected")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{option} {path}: the folder is not writable")


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, links and hard links included, or would if it existed."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return real_path(one) == real_path(other)


def discard_stdout() -> None:
    """Discard what is still buffered for standard output, so that Python does not fail on it at exit."""
    with suppress(OSError, ValueError):  # a replacement of standard output may have no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_plot(option: str, path: Path | None) -> None:
    """Refuse, before any work, a plot that could not be drawn."""
    if path is None:
        return
    check_target(option, path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{option} {path} must end in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{option} needs matplotlib, which is not installed: pip install 'mdkern[plots]'")


def add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models", "Without any of these, the small pair that ships with mdkern.")
    group.add_argument("--heavy", metavar="PATH", help="checkpoint that the schedule calls H (ours or MDLM's layout)")
    group.add_argument("--light", metavar="PATH", help="checkpoint that the schedule calls L")
    group.add_argument(
        "--model", metavar="NAME=PATH", action="append", default=[], type=named_path, help="one more; repeatable"
    )
    group.add_argument("--tokenizer", metavar="PATH", help="their tokenizer: a folder or a tokenizer.json")
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: bfloat16 on a GPU, else float32)",
    )


def choose_device(name: str | None) -> torch.device:
    """The device of that name; under ``torchrun`` the GPU that has the process's number, unless a number is named."""
    import torch

    from mdkern.distributed import local_rank

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device: expected cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"--device {name}: mdkern runs on cpu and cuda, not on {device.type}")
    device = torch.device("cuda", local_rank() if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        found = f"{count} GPU{'s' * (count != 1)} here" if count else "no GPU here"
        raise ValueError(f"--device {name}: there is no {device}, PyTorch finds {found}")
    torch.cuda.set_device(device)
    return device


def load_models(arguments: argparse.Namespace) -> tuple[dict[str, DiT], Any]:
    """The models by the schedule's names, and their tokenizer."""
    import torch

    from mdkern.pretrained import load_pair

    device = choose_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    named = [("H", arguments.heavy), ("L", arguments.light), *arguments.model]
    paths = [(name, path) for name, path in named if path is not None]
    if not paths:
        if arguments.tokenizer is not None:
            raise ValueError("--tokenizer goes with --heavy, --light or --model; the shipped pair has its own")
        heavy, light, tokenizer = load_pair(device, dtype)
        return {"H": heavy, "L": light}, tokenizer
    names = [name for name, _ in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"models must have different names (--heavy is H, --light is L), not {', '.join(names)}")
    if arguments.tokenizer is None:
        raise ValueError("--tokenizer must be given with --heavy, --light or --model")
    models = {name: load_model(name, path, dtype, device) for name, path in paths}
    tokenizer = load_tokenizer(arguments.tokenizer)
    for name, model in models.items():
        check_tokenizer(tokenizer, name, model)
    return models, tokenizer


def load_model(name: str, path: str, dtype: torch.dtype, device: torch.device) -> DiT:
    from mdkern.models import DiT

    try:
        return DiT.from_pretrained(path, dtype, device)
    except Exception as error:  # a foreign file may raise anything: KeyError, SafetensorError, UnpicklingError, …
        raise ValueError(f"model {name} cannot be loaded from {path}: {one_line(error)}") from error


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a file, a folder or a repository. No code of it is run, and the user is not asked."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from mdkern.models.weight_files import find_local, plain_file, read_json

    try:
        local = find_local(path, "tokenizer", single_names=True)
        if local is not None and not local.is_dir():
            return PreTrainedTokenizerFast(tokenizer_file=str(plain_file(local)))
        if local is not None:
            for file in local.glob("*.json"):
                plain_file(file)
            config = local / "tokenizer_config.json"
            code = read_json(config).get("auto_map") if config.exists() else None
            if code and not (local / "tokenizer.json").exists():
                raise ValueError("it needs code of its own, which is not run: save it as a fast one, a tokenizer.json")
            if code:
                return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=local is not None)
    except Exception as error:  # as above
        raise ValueError(f"--tokenizer {path} cannot be loaded: {one_line(error)}") from error


def check_tokenizer(tokenizer: Any, name: str, model: DiT) -> None:
    ids, vocab_size = len(tokenizer), model.config.vocab_size
    if ids > vocab_size:
        raise ValueError(f"--tokenizer has {ids} ids, model {name} only {vocab_size}: it belongs to another model")
    if tokenizer.mask_token_id not in (None, model.config.mask_id):
        raise ValueError(
            f"--tokenizer has mask id {tokenizer.mask_token_id}, model {name} has {model.config.mask_id}: "
            "it belongs to another model"
        )


def add_judge(group: argparse._ArgumentGroup, required: bool = False) -> None:
    group.add_argument("--judge", metavar="PATH", required=required, help="a causal language model of transformers")
    group.add_argument("--judge-tokenizer", metavar="PATH", help="if it has another one than the models")


def load_judge(
    path: str, tokenizer: str | None, model: DiT, model_tokenizer: Any
) -> tuple[Any, Callable[[Tensor], JudgedTexts]]:
    """A causal language model of transformers on a model's device, and how it scores that model's samples ``[N, L]``.

    With a tokenizer of its own it reads their texts.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from mdkern.evaluation.text import judge as judge_ids
    from mdkern.evaluation.text import judge_texts

    if not Path(path).is_dir():
        raise ValueError(f"--judge {path} is not a folder with a causal language model of transformers")
    disable_progress_bar()  # of the weights: it flashes past, terminal or not
    try:
        judge: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"--judge {path} cannot be loaded: {one_line(error)}") from error
    judge = judge.to(model.embedding.device).eval()
    if tokenizer is not None:
        own = load_tokenizer(tokenizer)
        return judge, lambda ids: judge_texts(judge, own, model_tokenizer.batch_decode(ids, skip_special_tokens=True))
    if judge.config.vocab_size < model.config.vocab_size - 1:  # it may lack the mask
        raise ValueError(
            f"--judge has {judge.config.vocab_size} ids, the model {model.config.vocab_size}: "
            "give --judge-tokenizer, with which it reads the texts"
        )
    return judge, lambda ids: judge_ids(judge, ids)
