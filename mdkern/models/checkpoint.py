"""Saving and loading a `DiT`: our own layout, and MDLM's (kuleshov-group/mdlm-owt, Lightning checkpoints with EMA)."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mdkern.models.dit import DiT, DiTConfig, TimeEmbedding

log = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]
CONFIG_FILE = "config.json"
MODEL_TYPE = "mdkern-dit"
VOCAB_ROWS = ("embedding", "head_weight", "head_bias")  # padded in memory, not in files


def save_dit(model: DiT, directory: PathLike, max_shard_size: str = "5GB") -> None:
    """Write ``config.json`` and the weights as safetensors, in the model's dtype, without the vocabulary's padding.

    Everything is written to a temporary folder beside `directory` and moved in place at the end, the config last.
    """
    from huggingface_hub import save_torch_state_dict

    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_head:
        del state["head_weight"]
    for name in VOCAB_ROWS:
        if name in state:
            state[name] = state[name][: model.config.vocab_size].contiguous()
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        save_torch_state_dict(state, staging, max_shard_size=max_shard_size)
        config = {"model_type": MODEL_TYPE, **asdict(model.config)}
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        target.mkdir(exist_ok=True)
        for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_FILE):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_dit(name_or_path: PathLike, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> DiT:
    """Load a `DiT` from a folder, a checkpoint file or a Hugging Face repository name.

    Args:
        name_or_path: what `DiT.save_pretrained` wrote, or weights laid out as MDLM's own (``backbone.*`` keys; a
            Lightning ``.ckpt`` gives its EMA weights).
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
    settings: dict[str, Any] = {}
    if path.is_dir() and (path / CONFIG_FILE).exists():
        settings = json.loads((path / CONFIG_FILE).read_text())
    if settings.get("model_type") != MODEL_TYPE:
        model = load_mdlm(path, settings)
    else:
        config = DiTConfig(**{key: value for key, value in settings.items() if key != "model_type"})
        model = build(config, read_weights(path))
    return model.to(device=device, dtype=dtype).eval() if dtype else model.to(device=device).eval()


def build(config: DiTConfig, state: Mapping[str, Tensor]) -> DiT:
    """A `DiT` holding the unpadded weights `state`, in their dtype."""
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
    missing, unexpected = sorted(model.state_dict().keys() - full.keys()), sorted(full.keys() - model.state_dict())
    if missing or unexpected:
        raise ValueError(f"weights do not fit the config: missing {missing[:5]}, not expected {unexpected[:5]}")
    for name, parameter in model.state_dict().items():
        if parameter.shape != full[name].shape:
            raise ValueError(f"{name} has shape {tuple(full[name].shape)}, the config wants {tuple(parameter.shape)}")
    model.load_state_dict(full, assign=True)
    if config.tie_head:
        model.head_weight = model.embedding
    return model.requires_grad_(True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder (safetensors shards preferred) or of a single file."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise ValueError(f"no *.safetensors and no *.bin in {path}")
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            state |= load_file(file)
        else:
            state |= lightning_weights(torch.load(file, map_location="cpu", weights_only=False))
    return state


def lightning_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a plain or a Lightning checkpoint; EMA weights in place of the raw ones where it has them."""
    state = dict(checkpoint.get("state_dict", checkpoint))
    shadow = checkpoint.get("ema", {}).get("shadow_params")
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
        settings: what the weights cannot tell: ``n_heads`` (else width / 64), ``time_conditioning`` (else False, as
            MDLM publishes), ``model_length`` (else 1024), ``mask_index`` (else the last id).

    Without time conditioning MDLM still feeds sigma = 0 through its time embedding; what comes out is a constant per
    block, computed here once.
    """
    settings = settings or {}
    state = {name.removeprefix("backbone."): tensor for name, tensor in read_weights(Path(path)).items()}
    if "vocab_embed.embedding" not in state:
        found = ", ".join(sorted(state)[:3])
        raise ValueError(f"{path} is neither an mdkern checkpoint nor laid out as MDLM's; its first weights: {found}")
    vocab_size, width = state["vocab_embed.embedding"].shape
    config = DiTConfig(
        vocab_size=vocab_size,
        mask_id=settings.get("mask_index", vocab_size - 1),
        max_length=settings.get("model_length", 1024),
        num_blocks=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        width=width,
        num_heads=settings.get("n_heads", width // 64),
        mlp_ratio=state["blocks.0.mlp.0.weight"].shape[0] // width,
        time_conditioning=bool(settings.get("time_conditioning", False)),
        cond_dim=state["sigma_map.mlp.2.weight"].shape[0],
        tie_head=False,
    )
    embedding = TimeEmbedding(config.cond_dim)
    time_weights = {
        f"{ours}.{kind}": state[f"sigma_map.mlp.{theirs}.{kind}"].float()
        for ours, theirs in (("up", 0), ("out", 2))
        for kind in ("weight", "bias")
    }
    embedding.load_state_dict(time_weights)
    with torch.no_grad():
        at_zero = embedding.from_sigma(torch.zeros(1))[0]

    def modulation(theirs: str, ours: str) -> dict[str, Tensor]:
        weight, bias = state[f"{theirs}.adaLN_modulation.weight"], state[f"{theirs}.adaLN_modulation.bias"]
        if config.time_conditioning:
            return {f"{ours}.weight": weight, f"{ours}.bias": bias}
        return {f"{ours}.bias": (weight.float() @ at_zero + bias.float()).to(bias.dtype)}

    weights = {
        "embedding": state["vocab_embed.embedding"],
        "norm_final.weight": state["output_layer.norm_final.weight"],
        "head_weight": state["output_layer.linear.weight"],
        "head_bias": state["output_layer.linear.bias"],
        **modulation("output_layer", "modulation_final"),
    }
    if config.time_conditioning:
        weights |= {f"time_embedding.{name}": tensor for name, tensor in time_weights.items()}
    renamed = {"mlp.0.": "mlp_up.", "mlp.2.": "mlp_down."}
    for block in range(config.num_blocks):
        weights |= modulation(f"blocks.{block}", f"blocks.{block}.modulation")
    for name, tensor in state.items():
        if name.startswith("blocks.") and "adaLN_modulation" not in name:
            for theirs, ours in renamed.items():
                name = name.replace(theirs, ours)
            weights[name] = tensor
    log.info("loaded an MDLM checkpoint: %d blocks, width %d, vocabulary %d", config.num_blocks, width, vocab_size)
    return build(config, weights)
