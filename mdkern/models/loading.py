"""`from_pretrained`: a checkpoint of any kind as a denoiser with its tokenizer, or the reason why it is none.

What a checkpoint is follows from its ``config.json``, and is decided before its weights are read: a `DiT` of ours, one
laid out as MDLM's, or a model of transformers, whose code may come with it. What such a model sees of a text is then
found out by running it (`mdkern.adapt`), as no config can be relied on to say that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mdkern.models.adapters import adapt
from mdkern.models.checkpoint import FINAL, MODEL_TYPE, load_dit
from mdkern.models.denoiser import Denoiser, available_device
from mdkern.models.hf.compat import load_module
from mdkern.models.hf.kinds import auto_class, check_masked
from mdkern.models.mdlm import OTHERS, refuse_others
from mdkern.models.tokenizers import check_tokenizer, end_of_turn, has_tokenizer, load_tokenizer, mask_of
from mdkern.models.weight_files import (
    CONFIG_FILE,
    PathLike,
    download,
    find_local,
    read_json,
    read_settings,
    read_shapes,
    weight_files,
)

OURS = (MODEL_TYPE, "mdlm", *OTHERS)  # kinds of checkpoints that `load_dit` reads, or refuses with the reason
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")  # everything in a repository except the weights
HUB = ("revision", "cache_dir", "token", "local_files_only")  # options of everything that is fetched from the Hub
ADAPTER_FILE = "adapter_config.json"  # peft's
OWN_FORMATS = ("variant", "gguf_file", "quantization_config")  # then the weights are in other files


def from_pretrained(
    name_or_path: PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    shifted: bool | None = None,
    block_causal: int | None = None,
    precision: str | None = None,
    head_precision: str | None = None,
    name: str | None = None,
    **options: Any,
) -> Denoiser:
    """Load a masked diffusion language model, ready for `mdkern.sample`.

    ``model = mdkern.from_pretrained(path)`` and ``mdkern.sample(model, ...)`` sample from it. The denoiser's ``model``
    is the loaded model, its ``tokenizer`` the checkpoint's tokenizer, or None if it has none.

    Args:
        name_or_path: a folder, a file of weights laid out as MDLM's, the folder of a training run, or the name of a
            repository on the Hugging Face Hub. It may hold a `DiT`, MDLM's network, a masked language model of
            transformers, or a model whose code comes with it, as those of LLaDA and Dream. Code that was written for
            transformers 4 is loaded under transformers 5, too.
        dtype: of the weights: a dtype or its name; ``"auto"`` keeps that of the files.
        device_map: where the weights go: a device, or what transformers takes, such as ``"auto"`` for all GPUs, which
            needs accelerate. None: the CPU. A `DiT` goes to one device.
        revision: of the repository: a branch, a tag or a commit.
        trust_remote_code: run code that comes with the checkpoint. It is never run without this.
        tokenizer: a tokenizer, or its path or name, if it is not with the checkpoint.
        mask_id: the mask token's id. None: that of the config or of the tokenizer.
        eos_id: an id that ends a text, or several. None: all that the config, the generation config and the tokenizer
            name, and the token that its chat template puts after an answer.
        shifted, block_causal, precision, head_precision, name: as in `mdkern.adapt`.
        options: passed on to ``from_pretrained`` of transformers (``cache_dir``, ``token``, ``local_files_only``,
            ``attn_implementation``, ``quantization_config``, ...). For a `DiT` only the first three have an effect, and
            others are refused.

    Raises:
        FileNotFoundError: there is nothing of that name, weights are missing, or the Hub cannot be reached.
        ValueError: it is not a masked diffusion language model, has no mask token, is broken, or does not fit the
            tokenizer; its code may not be run. The message says what to do.
    """
    loaded = load_checkpoint(
        name_or_path,
        dtype=dtype,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
        mask_id=mask_id,
        **options,
    )
    found = loaded.tokenizer
    facts: dict[str, Any] = {"eos_id": eos_id, "shifted": shifted, "block_causal": block_causal, "name": name}
    facts |= {"precision": precision, "head_precision": head_precision}
    denoiser = adapt(loaded.module, mask_id=loaded.mask_id, **facts)
    if found is not None:
        what = "its tokenizer" if tokenizer is None else "the tokenizer"
        check_tokenizer(found, denoiser, what, masks=mask_id is None)
        if eos_id is None:
            denoiser.eos_ids = tuple(dict.fromkeys((*denoiser.eos_ids, *ends_of(found, denoiser))))
    denoiser.tokenizer = found
    return denoiser


class Loaded(NamedTuple):
    """A checkpoint in memory."""

    module: nn.Module  # a `DiT`, or a model of transformers
    tokenizer: Any  # None: there is none
    mask_id: int | None  # None: the module has it


def load_checkpoint(
    name_or_path: PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    mask_id: int | None = None,
    **options: Any,
) -> Loaded:
    """The model of a checkpoint, not yet tried, with what belongs to it. See `from_pretrained`."""
    options = {**options, **({} if revision is None else {"revision": revision})}
    hub = {key: options[key] for key in HUB if key in options}
    if isinstance(device_map, str | int | torch.device) and device_map not in ("auto", "balanced", "sequential"):
        with suppress(RuntimeError):  # no device: a word of accelerate's
            device_map = available_device(torch.device(device_map))
    local = find_local(name_or_path, "model", single_names=True)
    if local is not None and hub.keys() - {"local_files_only"}:
        unused = min(hub.keys() - {"local_files_only"})
        raise ValueError(f"{unused} is for names on the Hugging Face Hub, but {name_or_path} is here: leave it out")
    run = local or download(str(name_or_path), "model", list(SMALL), **hub)
    path = run / str(options.get("subfolder") or "")
    if local is not None:
        options.pop("subfolder", None)
    if not (path / CONFIG_FILE).exists() and (path / ADAPTER_FILE).exists():
        base = read_json(path / ADAPTER_FILE).get("base_model_name_or_path")
        raise ValueError(
            f"{name_or_path} is an adapter of {base}: load that one, put the adapter on its model by"
            " peft.PeftModel.from_pretrained(denoiser.model, ...), and give the result to mdkern.adapt"
        )
    if path.is_dir() and not (path / CONFIG_FILE).exists() and (path / FINAL / CONFIG_FILE).exists():
        path = path / FINAL
    settings = read_settings(path)
    found = tokenizer_for(path, run, tokenizer, trust_remote_code, hub if tokenizer is not None else {})
    own = is_ours(path, settings)
    if own:
        mask = mask_id
        if settings.get("model_type") != MODEL_TYPE:
            refuse_others(path, settings)
        if local is None:
            download(str(name_or_path), "checkpoint", [*SMALL, "*.safetensors", "*.bin"], **hub)
        module = load_own(path, dtype, device_map, set(options) - {*HUB, "subfolder"}, mask_id)
    else:
        mask = mask_id if mask_id is not None else first_of(settings.get("mask_token_id"), mask_of(found))
        check_masked(str(name_or_path), settings, mask, trust_remote_code)
        if mask_id is None and found is not None and found.mask_token_id not in (None, mask):
            raise ValueError(
                f"{name_or_path} has mask id {mask}, but its tokenizer has {found.mask_token_id}: give mask_id, the one"
                " that the model was trained with, or the tokenizer that belongs to it"
            )
        refuse_others(path, settings, layout=False)
        if local is not None and not any(option in options for option in OWN_FORMATS):
            check_weights(path)
        module = load_foreign(str(path if local else name_or_path), settings, dtype, device_map,
                              options | {"trust_remote_code": trust_remote_code})  # fmt: skip
    return Loaded(module, found, None if own else mask)


def first_of(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def is_ours(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is for `load_dit` to read or to refuse, rather than for transformers."""
    kind = str(settings.get("model_type") or "").lower()
    return not path.is_dir() or kind in OURS or not (kind or settings.get("architectures") or settings.get("auto_map"))


def load_own(path: Path, dtype: Any, device_map: Any, others: set[str], mask_id: int | None) -> nn.Module:
    """A `DiT`."""
    if others:
        raise ValueError(f"{min(others)} has no effect on {path}: mdkern loads it without transformers. Leave it out")
    if device_map in ("auto", "balanced", "sequential"):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if device_map is not None and not isinstance(device_map, str | torch.device):
        raise ValueError(f"device_map must be one device for {path}, such as 'cuda:0', not {device_map!r}")
    model = load_dit(path, None if dtype == "auto" else dtype_of(dtype), device_map or "cpu")
    if mask_id not in (None, model.config.mask_id):
        raise ValueError(f"mask_id={mask_id} contradicts the mask id of {path}, {model.config.mask_id}: leave it out")
    return model


def dtype_of(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a floating dtype such as torch.bfloat16, not {dtype!r}")
    return found


def tokenizer_for(path: Path, run: Path, given: Any, trusted: bool, hub: Mapping[str, Any]) -> Any:
    """The tokenizer that was given, as it is or by its name, or the checkpoint's own; None if there is none."""
    if given is not None and not isinstance(given, str | Path):
        return given
    folders = [
        folder for folder in (path, run, run / "data" / "tokenizer") if folder.is_dir() and has_tokenizer(folder)
    ]
    where = given if given is not None else next(iter(folders), None)
    if where is None:
        return None
    try:
        return load_tokenizer(where, trusted, **{key: value for key, value in hub.items() if key != "revision"})
    except Exception as error:  # a foreign file may raise anything
        raise ValueError(f"the tokenizer {where} cannot be loaded: {' '.join(str(error).split())}") from error


def check_weights(path: Path) -> None:
    """Refuse a folder that lacks shards or has broken ones, before memory is taken for them."""
    if any(file.suffix == ".safetensors" for file in weight_files(path)):
        read_shapes(path)


def load_foreign(
    name: str, settings: Mapping[str, Any], dtype: Any, device_map: Any, options: dict[str, Any]
) -> nn.Module:
    """A model of transformers in eval mode, all of whose weights are from the checkpoint.

    Raises:
        ValueError: it cannot be loaded, or the checkpoint lacks some of its weights.
    """
    dtype = dtype if dtype == "auto" else dtype_of(dtype)
    device = device_map if isinstance(device_map, torch.device) else None
    spread = {} if device is not None or device_map is None else {"device_map": device_map}
    try:
        module, missing = load_module(name, auto_class(settings), dtype=dtype, **spread, **options)
    except ImportError as error:
        raise ValueError(f"{name} needs a package that is not installed: {one_line(error)}") from error
    except Exception as error:  # code that comes with a checkpoint may raise anything
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise ValueError(f"{name} cannot be loaded by transformers: {one_line(error)}") from error
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(module).__name__}, such as {missing[0]}, which would be"
            " random: it is a checkpoint of another kind of model, or not whole"
        )
    return module if device is None else module.to(device)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def ends_of(tokenizer: Any, denoiser: Denoiser) -> list[int]:
    """The ids that end a text as a tokenizer says: its end of text, and what its chat template puts after an answer."""
    named = (tokenizer.eos_token_id, end_of_turn(tokenizer))
    return [item for item in named if item is not None and item != denoiser.mask_id and item < denoiser.vocab_size]
