"""Saves and loads a `DiT` in our own layout. Checkpoints laid out as MDLM's are read by `mdkern.models.mdlm`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mdkern.models.dit import DiT, DiTConfig
from mdkern.models.mdlm import read_mdlm, without_time
from mdkern.models.weight_files import (
    CONFIG_FILE,
    PathLike,
    download,
    find_local,
    read_content,
    read_settings,
    read_shapes,
)

MODEL_TYPE = "mdkern-dit"
VOCAB_ROWS = ("embedding", "head_weight", "head_bias")  # padded in memory, not in files
RANDOM = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
FINAL = "final"  # the folder that a training run leaves its model in


def save_dit(model: DiT, directory: PathLike, max_shard_size: str = "5GB") -> None:
    """Write ``config.json`` and the weights as safetensors, in the model's dtype, without the vocabulary's padding.

    Everything is written to a temporary folder beside `directory` and moved into place at the end. Of an older
    checkpoint there, the config is removed first, and the new config comes last, so that a mixture of the two is never
    taken for a checkpoint.
    """
    from huggingface_hub import save_torch_state_dict

    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_head:
        del state["head_weight"]
    for name in VOCAB_ROWS:
        if name in state:
            state[name] = state[name][: model.config.vocab_size].clone()
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        save_torch_state_dict(state, staging, max_shard_size=max_shard_size)
        config = {"model_type": MODEL_TYPE, **asdict(model.config)}
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        target.mkdir(exist_ok=True)
        (target / CONFIG_FILE).unlink(missing_ok=True)
        for stale in (*target.glob("model*.safetensors"), *target.glob("model*.safetensors.index.json")):
            stale.unlink()
        for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_FILE):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_dit(name_or_path: PathLike, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> DiT:
    """Load a `DiT` from a folder, a checkpoint file or a Hugging Face repository name.

    Args:
        name_or_path: what `DiT.save_pretrained` wrote; the folder of a finished run of ``training.train``; or weights
            laid out as MDLM's (see `load_mdlm`), with a ``config.json`` beside them if there is one.
        dtype: floating dtype of the result; None keeps that of the files.
        device: the device of the result.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: weights of an unknown layout, that do not agree with the config, or that belong to another kind of
            model; a file that cannot be read.
    """
    path = find_local(name_or_path, "checkpoint")
    if path is None:
        path = download(str(name_or_path), "checkpoint", ["*.json", "*.safetensors", "*.bin"])
    if path.is_dir() and not (path / CONFIG_FILE).exists() and (path / FINAL / CONFIG_FILE).exists():
        path = path / FINAL
    settings = read_settings(path)
    if settings.get("model_type") == MODEL_TYPE:
        del settings["model_type"]
        model = load_ours(path, settings)
    elif path.is_dir() and (path / "log.jsonl").exists() and not settings:
        raise FileNotFoundError(f"the training run in {path} has no final model yet: let it finish")
    else:
        model = load_mdlm(path, settings)
    return model.to(device=device, dtype=dtype).eval()


def load_ours(path: Path, settings: Mapping[str, Any]) -> DiT:
    try:
        config = DiTConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG_FILE} of {path} does not describe a DiT: {error}") from error
    shapes = read_shapes(path)
    if shapes is not None:
        check_shapes(config, shapes)
    state, _ = read_content(path)
    return build(config, state)


def load_mdlm(path: PathLike, settings: Mapping[str, Any] | None = None) -> DiT:
    """A `DiT` with the weights of a checkpoint laid out as MDLM's own.

    Args:
        path: a folder or file with ``backbone.vocab_embed.embedding``, ``backbone.blocks.N.attn_qkv.weight``, …; of a
            Lightning ``.ckpt`` the EMA weights are taken and the run's own ``hyper_parameters`` read.
        settings: what the weights and the checkpoint's hyper-parameters do not contain; None reads ``config.json``.
            ``n_heads`` (default: width / 64), ``time_conditioning`` (False, as MDLM publishes), ``model_length``
            (1024), ``mask_index`` or ``mask_token_id`` (the last id, as with GPT-2's tokenizer; BERT's has its own),
            ``eos_token_id``. ``n_blocks``, ``hidden_dim``, ``cond_dim`` and ``vocab_size`` must agree with the weights.

    Raises:
        ValueError: weights that are not MDLM's, are incomplete, or contradict `settings` or the hyper-parameters; or
            that belong to a model that does not predict masked tokens from both sides: BD3-LM, DUO, SEDD, D3PM.

    Without time conditioning MDLM still feeds sigma = 0 through its time embedding. The result is a constant of each
    block, which is computed here once.
    """
    path = Path(path)
    config, weights, time_conditioning = read_mdlm(path, read_settings(path) if settings is None else settings)
    check_shapes(config, shapes_of(weights))
    if not time_conditioning:
        config, weights = replace(config, time_conditioning=False), without_time(weights)
    return build(config, weights)


def build(config: DiTConfig, state: Mapping[str, Tensor]) -> DiT:
    """A `DiT` with the unpadded weights `state`, in their dtype."""
    check_shapes(config, shapes_of(state))
    whole = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if whole:
        raise ValueError(f"{whole[0]} is of {state[whole[0]].dtype}: a floating dtype is needed")
    padding = config.padded_vocab_size - config.vocab_size
    full = dict(state)
    for name in VOCAB_ROWS:
        if name in full:
            full[name] = torch.cat((full[name], full[name].new_zeros(padding, *full[name].shape[1:])))
    if config.tie_head:
        full["head_weight"] = full["embedding"]
    with torch.device("meta"), Unfilled():
        model = DiT(config)
    model.load_state_dict(full, assign=True)
    if config.tie_head:
        model.head_weight = model.embedding
    return model.requires_grad_(True).to(model.embedding.device)  # takes the rotary tables off the meta device, too


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


class Unfilled(TorchFunctionMode):
    """Inside, random numbers are left out: to fill what has no memory, PyTorch imports its compiler, for a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function in RANDOM:
            return args[0] if args else given["tensor"]
        return function(*args, **given)


def check_shapes(config: DiTConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse unpadded weights whose names or shapes do not fit the config, before memory of the config's size is taken.

    One block is built, without memory, and represents all of them.
    """
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    if config.num_blocks > blocks:
        raise ValueError(f"weights do not fit the config: missing ['blocks.{blocks}.*'] of {config.num_blocks} blocks")
    if "embedding" in shapes and shapes["embedding"] != (config.vocab_size, config.width):
        wanted = config.vocab_size, config.width
        raise ValueError(f"embedding has shape {shapes['embedding']}, the config wants {wanted}")
    with torch.device("meta"), Unfilled():
        small = DiT(replace(config, num_blocks=1, max_length=1)).state_dict()
    expected = {}
    for name, tensor in small.items():
        for number in range(config.num_blocks if name.startswith("blocks.") else 1):
            expected[name.replace("blocks.0.", f"blocks.{number}.")] = tuple(tensor.shape)
    for name in VOCAB_ROWS:
        expected[name] = (config.vocab_size, *expected[name][1:])
    if config.tie_head:
        del expected["head_weight"]
    missing, unexpected = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"weights do not fit the config: missing {missing[:5]}, not expected {unexpected[:5]}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} has shape {shapes[name]}, the config wants {shape}")
