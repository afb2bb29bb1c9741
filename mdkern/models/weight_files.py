"""Reads files of weights, and their descriptions, without trusting them: no code in them runs.

An index may name files in its own folder only. Nothing but plain files is opened. A pickle gives tensors and plain
containers; everything else in it becomes `Opaque` objects. Shapes are read and checked before memory is taken for them.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

PathLike = str | os.PathLike[str]
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or shards named by <file>.index.json
LARGEST_JSON = 1 << 26  # bytes
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module)\.")  # prefixes of torch.compile and data parallelism
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_local(name_or_path: PathLike, what: str, single_names: bool = False) -> Path | None:
    """The file or folder of that name; None if it does not exist but may be a repository of the Hugging Face Hub.

    Args:
        what: what it should be, for the message.
        single_names: whether names without an owner may be on the Hub, too.

    Raises:
        FileNotFoundError: it does not exist and cannot be on the Hub, or its folder exists here.
    """
    path, text = Path(name_or_path), str(name_or_path)
    if path.exists():
        return path
    owner = text.partition("/")[0]
    if REPOSITORY.fullmatch(text) and Path(owner).is_dir():
        raise FileNotFoundError(f"no {what} at {text}: the folder {owner} is there, but has no {path.name}")
    if not REPOSITORY.fullmatch(text) and not (single_names and re.fullmatch(r"[\w-][\w.-]*", text)):
        raise FileNotFoundError(f"no {what} at {text}: expected a folder, a file or a repository's name (owner/name)")
    return None


def download(name: str, what: str, patterns: list[str], **options: Any) -> Path:
    """The folder of a repository that is downloaded from the Hugging Face Hub.

    `options`: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, as for ``snapshot_download``.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"no {what} at {name}: there is no such folder here, and the Hugging Face Hub does not give it ({reason})."
            " Check the name and the connection, or give a folder that was downloaded elsewhere"
        ) from error


def plain_file(file: Path) -> Path:
    """`file`, refused if it is not a plain file: reading a pipe or a device may never end."""
    try:
        mode = file.stat().st_mode
    except OSError as error:  # a loop of links
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} is no plain file")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError with the file and the reason."""
    if plain_file(file).stat().st_size > LARGEST_JSON:
        raise ValueError(f"{file} has more than {LARGEST_JSON} bytes: that is no description of a model")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object with names, not {type(content).__name__}")
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """The ``config.json`` in a folder or beside a file; empty if there is none."""
    file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    return read_json(file) if os.path.lexists(file) else {}


def weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights, or the file itself."""
    if not path.is_dir():
        return [plain_file(path)]
    for name in WEIGHT_FILES:
        if os.path.lexists(path / name):
            return [plain_file(path / name)]
        if os.path.lexists(index := path / f"{name}.index.json"):
            return indexed_files(index)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors and no *.bin in {path}")
    return [plain_file(file) for file in files]


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, all of them in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or {type(shard) for shard in weight_map.values()} != {str}:
        raise ValueError(f"{index} has no weight_map from names to files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        parts = PurePosixPath(shard).parts
        if not parts or os.path.isabs(shard) or ".." in parts or "\\" in shard:
            raise ValueError(f"{index} names {shard!r}, which lies outside of its folder")
    missing = [shard for shard in shards if not os.path.lexists(index.parent / shard)]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names")
    return [plain_file(index.parent / shard) for shard in shards]


def read_shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the tensors in a folder or file, from its headers alone; None for pickles, which have none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        if file.suffix != ".safetensors":
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    shapes[bare_name(name)] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole file of weights: {error}") from error
    return shapes


def bare_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    return WRAPPERS.sub("", name)


def read_content(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a folder (safetensors preferred) or of a single file, and what else a checkpoint holds.

    The prefixes `WRAPPERS` are removed from names. The tensors of a checkpoint are those of its ``state_dict``.
    """
    state: dict[str, Tensor] = {}
    beside: dict[str, Any] = {}
    for file in weight_files(path):
        try:
            content: Mapping[str, Any] = load_file(file) if file.suffix == ".safetensors" else load_pickle(file)
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, RecursionError, OSError) as error:
            raise ValueError(f"{file} is not a whole file of weights: {error}") from error
        except (TypeError, AttributeError, KeyError, IndexError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{file} is not a file of weights: {error!r}") from error
        inner = content.get("state_dict", content)
        if not isinstance(inner, Mapping):
            raise ValueError(f"{file} has a state_dict that is no mapping from names to weights")
        for name, tensor in inner.items():
            if isinstance(tensor, Tensor) and isinstance(name, str):
                if bare_name(name) in state:
                    raise ValueError(f"{file} has two weights of the name {bare_name(name)}")
                state[bare_name(name)] = check_stored(tensor, name, file)
        beside |= {str(name): value for name, value in content.items() if not isinstance(value, Tensor)}
    beside.pop("state_dict", None)
    return state, beside


def check_stored(tensor: Tensor, name: str, file: Path) -> Tensor:
    """The tensor as a dense one, refused if the file does not hold all its numbers: with strides of 0, one number can
    have any shape."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"{name} of {file} is no dense tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} of {file} has fewer bytes than its shape {tuple(tensor.shape)} needs")
    return tensor


class Opaque:
    """Stands for an object of a pickle that is neither a tensor nor a plain container, with its content as data."""

    source = ""  # the class or function that it stands for

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__.setdefault("items", {})[str(key)] = value

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers only. A Lightning checkpoint also holds its run's settings and tokenizer,
    whose classes may not be installed here, and whose unpickling could run any code."""

    KNOWN = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in self.KNOWN:
            return super().find_class(module, name)
        return type("Opaque", (Opaque,), {"source": f"{module}.{name}"})


def load_pickle(file: Path) -> Mapping[str, Any]:
    """The mapping that `torch.save` wrote to `file`; objects of other classes in it are `Opaque`."""

    def load(stream: BinaryIO, **options: Any) -> Any:
        return TensorUnpickler(stream, **options).load()

    restricted = SimpleNamespace(Unpickler=TensorUnpickler, load=load, __name__="restricted pickle")
    content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=restricted)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds no mapping from names to weights")
    return content
