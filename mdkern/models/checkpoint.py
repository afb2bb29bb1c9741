"""Saving and loading a `DiT`: our own layout, and MDLM's (kuleshov-group/mdlm-owt, Lightning checkpoints with EMA)."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mdkern.models.dit import DiT, DiTConfig, TimeEmbedding

log = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]
CONFIG_FILE = "config.json"
MODEL_TYPE = "mdkern-dit"
VOCAB_ROWS = ("embedding", "head_weight", "head_bias")  # padded in memory, not in files
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or shards named by <file>.index.json
MDLM_NAMES = {  # theirs, without "backbone." -> ours
    r"vocab_embed\.embedding": "embedding",
    r"sigma_map\.mlp\.0\.": "time_embedding.up.",
    r"sigma_map\.mlp\.2\.": "time_embedding.out.",
    r"(blocks\.\d+)\.mlp\.0\.": r"\1.mlp_up.",
    r"(blocks\.\d+)\.mlp\.2\.": r"\1.mlp_down.",
    r"(blocks\.\d+)\.adaLN_modulation\.": r"\1.modulation.",
    r"output_layer\.adaLN_modulation\.": "modulation_final.",
    r"output_layer\.norm_final\.": "norm_final.",
    r"output_layer\.linear\.": "head_",
}


def save_dit(model: DiT, directory: PathLike, max_shard_size: str = "5GB") -> None:
    """Write ``config.json`` and the weights as safetensors, in the model's dtype, without the vocabulary's padding.

    Everything is written to a temporary folder beside `directory` and moved in place at the end. An older checkpoint
    there loses its config first and the new config comes last, so that no moment shows a mixture of the two.
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
        name_or_path: what `DiT.save_pretrained` wrote, or weights laid out as MDLM's own (``backbone.*`` keys; a
            Lightning ``.ckpt`` gives its EMA weights), with the ``config.json`` beside them if there is one.
        dtype: floating dtype of the result; None keeps the files'.
        device: where to put it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: weights that fit no known layout, or that miss or exceed what the config says.
    """
    path = Path(name_or_path)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {name_or_path}: expected a folder, a file or a repository name")
    settings = read_settings(path)
    if settings.pop("model_type", None) != MODEL_TYPE:
        model = load_mdlm(path, settings)
    else:
        try:
            config = DiTConfig(**settings)
        except TypeError as error:
            raise ValueError(f"{CONFIG_FILE} of {path} does not describe a DiT: {error}") from error
        model = build(config, read_weights(path))
    return model.to(device=device, dtype=dtype).eval() if dtype else model.to(device=device).eval()


def read_settings(path: Path) -> dict[str, Any]:
    """What the ``config.json`` of a folder, or beside a file, says."""
    file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def build(config: DiTConfig, state: Mapping[str, Tensor]) -> DiT:
    """A `DiT` holding the unpadded weights `state`, in their dtype."""
    check_weights(config, state)
    padding = config.padded_vocab_size - config.vocab_size
    full = dict(state)
    for name in VOCAB_ROWS:
        if name in full:
            tail = (0, padding) if full[name].ndim == 1 else (0, 0, 0, padding)
            full[name] = F.pad(full[name], tail)
    if config.tie_head:
        full["head_weight"] = full["embedding"]
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(full, assign=True)
    if config.tie_head:
        model.head_weight = model.embedding
    return model.requires_grad_(True).to(model.embedding.device)  # the tables leave the meta device too


def check_weights(config: DiTConfig, state: Mapping[str, Tensor]) -> None:
    """Refuse unpadded weights whose names or shapes are not the config's."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}
    for name in VOCAB_ROWS:
        expected[name] = (config.vocab_size, *expected[name][1:])
    if config.tie_head:
        del expected["head_weight"]
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"weights do not fit the config: missing {missing[:5]}, not expected {unexpected[:5]}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the config wants {shape}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder (safetensors preferred) or of a single file."""
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            state |= load_file(file) if file.suffix == ".safetensors" else lightning_weights(load_tensors(file))
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"{file} is not a whole file of weights: {error}") from error
    return state


def weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for name in WEIGHT_FILES:
        index = path / f"{name}.index.json"
        files = [path / name] if (path / name).exists() else []
        if not files and index.exists():
            files = sorted({path / shard for shard in json.loads(index.read_text())["weight_map"].values()})
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise FileNotFoundError(f"{path} lacks {', '.join(missing)}, which {index.name} names")
        if files:
            return files
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors and no *.bin in {path}")
    return files


class Placeholder:
    """Stands for any object of a pickle that is no tensor."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers only: a Lightning checkpoint also holds its run's settings and tokenizer,
    whose classes need not be installed here, and whose unpickling could run any code."""

    KNOWN = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in self.KNOWN else Placeholder


def load_tensors(file: Path) -> Mapping[str, Any]:
    """The mapping that `torch.save` wrote to `file`; what is in it besides tensors and plain containers is lost."""

    def load(stream: BinaryIO, **options: Any) -> Any:
        return TensorUnpickler(stream, **options).load()

    restricted = SimpleNamespace(Unpickler=TensorUnpickler, load=load, __name__="restricted pickle")
    content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=restricted)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds no mapping from names to weights")
    return content


def lightning_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a plain or a Lightning checkpoint; EMA weights in place of the raw ones where it has them."""
    state = {
        name: value for name, value in checkpoint.get("state_dict", checkpoint).items() if isinstance(value, Tensor)
    }
    shadow = (checkpoint.get("ema") or {}).get("shadow_params")
    if shadow:
        # MDLM's EMA is a list in the order of the backbone's parameters; buffers of the state dict have no entry.
        names = [name for name in state if name.startswith("backbone.") and not name.endswith("rotary_emb.inv_freq")]
        shadow = shadow[: len(names)]  # the noise schedule's parameters, if it has any, come after the backbone's
        shapes = [(tuple(state[name].shape), tuple(ema.shape)) for name, ema in zip(names, shadow)]
        if len(shadow) < len(names) or any(raw != ema for raw, ema in shapes):
            raise ValueError("the checkpoint's EMA parameters do not line up with its backbone's parameters")
        state |= dict(zip(names, shadow))
    return state


def load_mdlm(path: PathLike, settings: Mapping[str, Any] | None = None) -> DiT:
    """A `DiT` with the weights of a checkpoint laid out as MDLM's own.

    Args:
        path: a folder or file with ``backbone.vocab_embed.embedding``, ``backbone.blocks.N.attn_qkv.weight``, ….
        settings: what the weights cannot tell; None reads ``config.json``. ``n_heads`` (else width / 64),
            ``time_conditioning`` (else False, as MDLM publishes), ``model_length`` (else 1024), ``mask_index`` or
            ``mask_token_id`` (else the last id, as with GPT-2's tokenizer; BERT's has its own), ``eos_token_id``.
            ``n_blocks``, ``hidden_dim``, ``cond_dim`` and ``vocab_size`` must agree with the weights.

    Raises:
        ValueError: weights that are not MDLM's, that are not all there, or that `settings` contradict.

    Without time conditioning MDLM still feeds sigma = 0 through its time embedding; what comes out is a constant per
    block, computed here once.
    """
    path = Path(path)
    settings = read_settings(path) if settings is None else settings
    weights = mdlm_weights(path)
    vocab_size, width = weights["embedding"].shape
    cond_dim = weights["time_embedding.out.weight"].shape[0]
    for name, found in (("vocab_size", vocab_size), ("hidden_dim", width), ("cond_dim", cond_dim)):
        if settings.get(name, found) != found:
            raise ValueError(f"the config says {name}={settings[name]}, the weights of {path} have {found}")
    last_block = max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    mask_id = settings.get("mask_index", settings.get("mask_token_id"))
    config = DiTConfig(
        vocab_size=vocab_size,
        mask_id=vocab_size - 1 if mask_id is None else mask_id,
        eos_id=settings.get("eos_token_id"),
        max_length=settings.get("model_length", 1024),
        num_blocks=settings.get("n_blocks", last_block + 1),
        width=width,
        num_heads=settings.get("n_heads", max(1, width // 64)),
        mlp_ratio=weights["blocks.0.mlp_up.weight"].shape[0] // width,
        time_conditioning=True,
        cond_dim=cond_dim,
    )
    check_weights(config, weights)
    if not settings.get("time_conditioning", False):
        config, weights = replace(config, time_conditioning=False), without_time(weights)
    log.info("loaded an MDLM checkpoint: %d blocks, width %d, vocabulary %d", config.num_blocks, width, vocab_size)
    return build(config, weights)


def mdlm_weights(path: Path) -> dict[str, Tensor]:
    """The backbone's weights under our names."""
    state = read_weights(path)
    backbone = {name.removeprefix("backbone."): state[name] for name in state if name.startswith("backbone.")} or state
    weights = {}
    for name, tensor in backbone.items():
        for theirs, ours in MDLM_NAMES.items():
            name = re.sub(rf"^{theirs}", ours, name)
        weights[name] = tensor
    weights.pop("rotary_emb.inv_freq", None)
    if "vocab_embed.embedding" not in backbone:
        found = ", ".join(sorted(state)[:3]) or "none"
        raise ValueError(f"{path} is neither an mdkern checkpoint nor laid out as MDLM's; its first weights: {found}")
    needed = ("time_embedding.out.weight", "blocks.0.mlp_up.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"{path} is laid out as MDLM's but not whole: missing {missing}")
    return weights


@torch.no_grad()
def without_time(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function at sigma = 0, with the modulations as constants."""
    prefix = "time_embedding."
    time = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    embedding = TimeEmbedding(time["out.bias"].shape[0])
    embedding.load_state_dict(time)
    at_zero = embedding.from_sigma(torch.zeros(1))[0]
    constant = {}
    for name, tensor in weights.items():
        if re.search(r"modulation(_final)?\.bias$", name):
            slope = weights[name.removesuffix("bias") + "weight"]
            constant[name] = (slope.float() @ at_zero + tensor.float()).to(tensor.dtype)
        elif "modulation" not in name and not name.startswith(prefix):
            constant[name] = tensor
    return constant
