"""Shared by the commands: types of arguments, output files, devices, models and their tokenizer."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern.files import real_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mdkern.evaluation.text import JudgedTexts
    from mdkern.models import Denoiser


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
    """A model's name in the schedule and its path, from ``NAME=PATH`` or, for H, the path alone."""
    name, _, path = text.partition("=")
    if re.fullmatch(r"[A-Za-z_]+", name) and path:
        return name.upper(), path
    if not text or text.startswith("=") or text.endswith("="):
        raise argparse.ArgumentTypeError(f"must be PATH, or NAME=PATH with a name of letters, not {text!r}")
    return "H", text


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


def add_models(
    parser: argparse.ArgumentParser, intro: str = "Without any of these, the small pair that ships with mdkern."
) -> None:
    group = parser.add_argument_group("models", intro)
    what = "a folder or a name on the Hugging Face Hub"
    group.add_argument("--heavy", metavar="PATH", help=f"model that the schedule calls H: {what}")
    group.add_argument("--light", metavar="PATH", help="model that the schedule calls L")
    group.add_argument(
        "--model",
        metavar="[NAME=]PATH",
        action="append",
        default=[],
        type=named_path,
        help="one more, by the schedule's name for it (default: H); repeatable",
    )
    group.add_argument("--tokenizer", metavar="PATH", help="their tokenizer, if it is not with the first of them")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with a model; read it before"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: bfloat16 on a GPU, else float32)",
    )
    group.add_argument(
        "--precision",
        choices=["bf16", "fp8"],
        help="of the matrix products: fp8 is faster and less accurate; bf16, the default, is the dtype of the weights",
    )
    group.add_argument(
        "--head-precision",
        choices=["bf16", "fp8"],
        help="of the output layer's weight: fp8 reads half of the bytes, for few rows; bf16, the default, is its dtype",
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


def precisions(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_models` that say in how many bits models run."""
    return {"precision": arguments.precision, "head_precision": arguments.head_precision}


def load_models(arguments: argparse.Namespace) -> tuple[dict[str, Denoiser], Any]:
    """The models by the schedule's names, and their tokenizer."""
    import torch

    from mdkern.models import adapt
    from mdkern.models.tokenizers import check_tokenizer
    from mdkern.pretrained import load_pair

    device = choose_device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    named = [("H", arguments.heavy), ("L", arguments.light), *arguments.model]
    paths = [(name, path) for name, path in named if path is not None]
    if not paths:
        only = {"--tokenizer": arguments.tokenizer, "--revision": arguments.revision}
        given = [option for option, value in only.items() if value is not None]
        given += ["--trust-remote-code"] * arguments.trust_remote_code
        if given:
            raise ValueError(f"{given[0]} goes with --heavy, --light or --model; the shipped pair has its own files")
        pair = load_pair(device, dtype)
        both = {"H": pair.heavy, "L": pair.light}
        return {name: adapt(model, **precisions(arguments)) for name, model in both.items()}, pair.tokenizer
    names = [name for name, _ in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"models must have different names (--heavy is H, --light is L), not {', '.join(names)}")
    tokenizer: Any = None
    if arguments.tokenizer is not None:
        tokenizer = load_named_tokenizer("--tokenizer", arguments.tokenizer, arguments.trust_remote_code)
    options = {
        "revision": arguments.revision,
        "trust_remote_code": arguments.trust_remote_code,
        **precisions(arguments),
    }
    models = {name: load_model(name, path, dtype, device, tokenizer, **options) for name, path in paths}
    if tokenizer is None:
        tokenizer = shared_tokenizer(models, paths[0][1])
    for name, model in models.items():
        check_tokenizer(
            tokenizer, model, "the tokenizer" if arguments.tokenizer is None else "--tokenizer", f"model {name}"
        )
    return models, tokenizer


def load_model(
    name: str, path: str, dtype: torch.dtype, device: torch.device, tokenizer: Any = None, **options: Any
) -> Denoiser:
    """`mdkern.from_pretrained`, with the model's name in the error."""
    from transformers.utils.logging import disable_progress_bar

    from mdkern.models.loading import from_pretrained

    disable_progress_bar()  # of the weights: it flashes past, terminal or not
    try:
        return from_pretrained(path, dtype=dtype, device_map=device, tokenizer=tokenizer, **options)
    except Exception as error:  # a foreign file may raise anything: KeyError, SafetensorError, UnpicklingError, …
        raise ValueError(f"model {name} cannot be loaded from {path}: {one_line(error)}") from error


def load_named_tokenizer(option: str, path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer that an option names."""
    from mdkern.models.tokenizers import load_tokenizer

    try:
        return load_tokenizer(path, trust_remote_code)
    except Exception as error:  # as above
        raise ValueError(f"{option} {path} cannot be loaded: {one_line(error)}") from error


def shared_tokenizer(models: Mapping[str, Denoiser], first_path: str) -> Any:
    """The tokenizer that comes with the models. Refuses models with none, and those with different ones."""
    own = {name: model.tokenizer for name, model in models.items() if model.tokenizer is not None}
    if not own:
        raise ValueError(f"--tokenizer must be given: there is none with {first_path}")
    first, *others = own
    for name in others:
        if own[name].get_vocab() != own[first].get_vocab():
            raise ValueError(
                f"models must share their tokenizer, but the vocabulary of {name} is not that of {first}: take models"
                " that were trained with the same one"
            )
    return own[first]


def longest_of(models: Iterable[Denoiser], length: int | None, new_tokens: int | None = None) -> int:
    """The most positions that all models take; with models that know no limit, what the options ask for."""
    limits = [model.max_length for model in models if model.max_length is not None]
    if limits:
        return min(limits)
    if new_tokens is not None:
        return LARGEST
    if length is None:
        raise ValueError("--length must be given: the models' configs do not say how long a text may be")
    return length


def add_judge(group: argparse._ArgumentGroup, required: bool = False) -> None:
    group.add_argument("--judge", metavar="PATH", required=required, help="a causal language model of transformers")
    group.add_argument("--judge-tokenizer", metavar="PATH", help="if it has another one than the models")


def load_judge(
    path: str, tokenizer: str | None, model: Denoiser, model_tokenizer: Any
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
    disable_progress_bar()  # as above
    try:
        judge: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"--judge {path} cannot be loaded: {one_line(error)}") from error
    judge = judge.to(model.device).eval()
    if tokenizer is not None:
        own = load_named_tokenizer("--judge-tokenizer", tokenizer)
        return judge, lambda ids: judge_texts(judge, own, model_tokenizer.batch_decode(ids, skip_special_tokens=True))
    if judge.config.vocab_size < model.vocab_size - 1:  # it may lack the mask
        raise ValueError(
            f"--judge has {judge.config.vocab_size} ids, the model {model.vocab_size}: "
            "give --judge-tokenizer, with which it reads the texts"
        )
    return judge, lambda ids: judge_ids(judge, ids)
