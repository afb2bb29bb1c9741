"""Reads checkpoints laid out as MDLM's (kuleshov-group/mdlm), and refuses those that only look like them.

BD3-LM, DUO, SEDD and D3PM have the same transformer with the same names of weights, but another attention, another
noise or another meaning of the output. They are distinguished by their configuration: a ``config.json`` of
transformers, or the ``hyper_parameters`` that Lightning keeps in a checkpoint. See docs/notes/checkpoints.md.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdkern.models.dit import DiTConfig, TimeEmbedding
from mdkern.models.weight_files import Opaque, read_content

log = logging.getLogger(__name__)
NAMES = {  # MDLM's names, without "backbone." -> ours
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
RUN_SETTINGS = {  # places in a run's configuration -> names in config.json; of several the last one counts
    "n_heads": ("model.n_heads",),
    "n_blocks": ("model.n_blocks",),
    "hidden_dim": ("model.hidden_size",),
    "cond_dim": ("model.cond_dim",),
    "model_length": ("model.length",),
    "time_conditioning": ("time_conditioning", "algo.time_conditioning"),
    "parameterization": ("parameterization", "algo.parameterization"),
    "backbone": ("backbone", "algo.backbone"),
    "algorithm": ("algo.name",),
    "causal": ("algo.causal_attention", "model.causal_attention"),
    "cross_attn": ("algo.cross_attn",),
    "block_size": ("block_size",),
    "diffusion": ("diffusion",),
    "noise": ("noise.type",),
    "tokenizer": ("data.tokenizer_name_or_path",),
}
MASK_IDS = {"bert-base-uncased": 103, "text8": 4}  # of the tokenizers that MDLM was published with
MASKING = ("", "absorbing_state", "absorbing", "mask", "masked")  # names of its noise
OTHERS = {
    "bd3lm": "BD3-LM attends to whole blocks from left to right and is sampled block by block",
    **dict.fromkeys(
        ("duo", "duo_base", "distillation", "ot-finetune"), "DUO starts from uniformly random tokens and has no mask"
    ),
    "sedd": "SEDD gives ratios of probabilities, not probabilities of tokens",
    "d3pm": "D3PM gives the mask a probability, too",
    "ar": "it is autoregressive",
}


def read_mdlm(path: Path, settings: Mapping[str, Any]) -> tuple[DiTConfig, dict[str, Tensor], bool]:
    """The config and the weights, under our names, of an MDLM checkpoint, and whether the model is given the time.

    The weights are always those of a model with time conditioning. See `mdkern.models.checkpoint.load_mdlm`.
    """
    refuse_others(path, settings)
    state, beside = read_content(path)
    if "model" in beside and "ema" in beside and not state:
        raise ValueError(f"{path} is a training checkpoint of SEDD, which mdkern does not sample: {OTHERS['sedd']}")
    settings = agreed(path, settings, run_settings(path, beside.get("hyper_parameters"), state))
    refuse_others(path, settings)
    weights = renamed(path, averaged(path, state, beside.get("ema")), settings)
    vocab_size, width = weights["embedding"].shape
    cond_dim = weights["time_embedding.out.weight"].shape[0]
    for name, found in (("vocab_size", vocab_size), ("hidden_dim", width), ("cond_dim", cond_dim)):
        if settings.get(name, found) != found:
            raise ValueError(f"the config says {name}={settings[name]}, the weights of {path} have {found}")
    last_block = max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    try:
        config = DiTConfig(
            vocab_size=vocab_size,
            mask_id=settings.get("mask_index", vocab_size - 1),
            eos_id=settings.get("eos_token_id"),
            max_length=settings.get("model_length", 1024),
            num_blocks=settings.get("n_blocks", last_block + 1),
            width=width,
            num_heads=settings.get("n_heads", max(1, width // 64)),
            mlp_ratio=weights["blocks.0.mlp_up.weight"].shape[0] // max(width, 1),
            time_conditioning=True,
            cond_dim=cond_dim,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings of {path} do not describe a DiT: {error}") from error
    log.info("read an MDLM checkpoint: %d blocks, width %d, vocabulary %d", config.num_blocks, width, vocab_size)
    return config, weights, settings.get("time_conditioning", False)


def refuse_others(path: Path, settings: Mapping[str, Any], layout: bool = True) -> None:
    """Raise ValueError with the reason if the settings are those of another kind of model than MDLM.

    `layout`: it must also be laid out as MDLM's.
    """

    def text(name: str) -> str:
        value = settings.get(name)
        return value.lower() if isinstance(value, str) else ""

    kind, parameterization = text("model_type") or text("algorithm"), text("parameterization")
    meant = {"sedd": "sedd", "score": "sedd", "ar": "ar"}.get(parameterization, "")
    signs = (  # the first that is there is the reason
        (isinstance(settings.get("graph"), Mapping), OTHERS["sedd"]),  # SEDD's config.json is its run's configuration
        (settings.get("causal"), OTHERS["ar"]),
        (settings.get("cross_attn"), OTHERS["bd3lm"]),
        (layout and settings.get("block_size") not in (None, settings.get("model_length")), OTHERS["bd3lm"]),
        (kind in OTHERS, OTHERS.get(kind)),
        (meant, OTHERS.get(meant)),
        (parameterization not in ("", "subs"), f"its parameterization {parameterization!r} is not MDLM's 'subs'"),
        (text("diffusion") not in MASKING, f"its noise is {text('diffusion')!r}, not masking"),
        (
            layout and text("backbone") not in ("", "dit"),
            f"its backbone is {text('backbone')!r}, not the transformer of MDLM",
        ),
        (
            settings.get("time_conditioning") and text("noise") not in ("", "loglinear", "log-linear"),
            f"it is conditioned on the times of noise {text('noise')!r}, not of the log-linear one",
        ),
        (layout and kind not in ("", "mdlm"), f"{kind!r} is no kind of model that mdkern knows"),
    )
    for there, reason in signs:
        if there:
            raise ValueError(f"{path} cannot be loaded as a masked diffusion model: {reason}")
    if not isinstance(settings.get("time_conditioning", False), bool):
        raise ValueError(f"time_conditioning of {path} must be true or false, not {settings['time_conditioning']!r}")


def agreed(path: Path, given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings and those of the checkpoint together, refused if they contradict each other."""
    given = {name: value for name, value in given.items() if value is not None}
    if "mask_token_id" in given:
        given.setdefault("mask_index", given.pop("mask_token_id"))
    for name in own.keys() & given.keys():
        if own[name] != given[name]:
            raise ValueError(f"the config says {name}={given[name]}, the run that wrote {path} had {own[name]}")
    return {**given, **own}


def run_settings(path: Path, hyper_parameters: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The ``hyper_parameters`` of a Lightning checkpoint, under the names of a ``config.json``."""
    if not isinstance(hyper_parameters, Mapping):
        return {}
    run = plain(hyper_parameters.get("config"))
    if not isinstance(run, Mapping):
        if "config" in hyper_parameters:
            log.warning("the hyper-parameters of %s cannot be read: only its config.json counts", path)
        return {}
    found = ((name, look_up(run, place)) for name, places in RUN_SETTINGS.items() for place in places)
    settings = {name: value for name, value in found if value is not None}
    if settings.get("algorithm") is None and settings.get("parameterization") == "subs":
        settings["algorithm"] = "mdlm"
    tokenizer = str(settings.pop("tokenizer", ""))
    if tokenizer in MASK_IDS:
        settings["mask_index"] = MASK_IDS[tokenizer]
    vocab_size = len(state.get("backbone.vocab_embed.embedding", ()))
    return settings | special_ids(hyper_parameters.get("tokenizer"), vocab_size)


def state_of(value: Any) -> Mapping[str, Any]:
    """The attributes that the unpickler found of an object that is not built; none of anything else."""
    state = getattr(value, "state", None)
    return state if isinstance(state, Mapping) else {}


def plain(value: Any, depth: int = 0) -> Any:
    """OmegaConf's containers, as the unpickler returns them, as dicts and lists; plain values as they are."""
    if depth > 32:
        return None
    if isinstance(value, Opaque):
        return plain(state_of(value).get("_content", state_of(value).get("_val")), depth + 1)
    if isinstance(value, Mapping):
        return {str(name): plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    return value


def look_up(run: Mapping[str, Any], place: str, depth: int = 0) -> Any:
    """The value at a dotted place. References such as ``${model.length}`` are followed; others give None."""
    value: Any = run
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str) and "${" in value:
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value)
        return look_up(run, reference[1], depth + 1) if reference and depth < 8 else None
    return value


def special_ids(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    """``mask_index`` and ``eos_token_id`` of a pickled tokenizer, as far as they can be read.

    For a tokenizer without a mask token, the mask is one past its ids, the last id of the model.
    """
    state = state_of(tokenizer)
    tokens, ids = state.get("_special_tokens_map"), token_ids(state)
    found = {}
    for name, key in (("mask_token", "mask_index"), ("eos_token", "eos_token_id")):
        token = (tokens.get(name) if isinstance(tokens, Mapping) else None) or state.get(f"_{name}")
        text = state_of(token).get("content", token)
        if isinstance(text, str) and ids.get(text, vocab_size) < vocab_size:
            found[key] = ids[text]
        elif text is None and name == "mask_token" and ids and vocab_size:
            found[key] = vocab_size - 1
    return found


def token_ids(state: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token of a pickled tokenizer: from the JSON of a fast one, or the tables of a slow one."""
    ids: dict[str, int] = {}
    serialised = getattr(state.get("_tokenizer"), "state", None)
    if isinstance(serialised, Opaque) and serialised.source == "_codecs.encode":  # how old pickles store bytes
        serialised = str(serialised.arguments[0]).encode("latin-1")
    tables: list[Any] = [value for value in state.values() if isinstance(value, Mapping)]
    if isinstance(serialised, bytes):
        try:
            content = json.loads(serialised)
            tables += [content["model"].get("vocab"), {t["content"]: t["id"] for t in content["added_tokens"]}]
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}
    for table in tables:
        if isinstance(table, Mapping):
            ids |= {key: number for key, number in table.items() if isinstance(key, str) and type(number) is int}
    return ids


def averaged(path: Path, state: dict[str, Tensor], ema: Any) -> dict[str, Tensor]:
    """The weights, with averaged ones (EMA) in place of the raw ones if the checkpoint has them.

    MDLM's EMA is a list in the order of the backbone's parameters, without buffers of the state dict.
    """
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not shadow:
        return state
    names = [name for name in state if name.startswith("backbone.") and not name.endswith("rotary_emb.inv_freq")]
    shadow = list(shadow)[: len(names)]  # parameters of the noise schedule come after the backbone's
    fits = all(isinstance(new, Tensor) and new.shape == state[name].shape for name, new in zip(names, shadow))
    if len(shadow) < len(names) or not fits:
        raise ValueError(f"{path}: the EMA parameters do not line up with the backbone's parameters")
    return state | dict(zip(names, shadow))


def renamed(path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The backbone's weights under our names."""
    if "sampling_eps_min" in state:
        raise ValueError(f"{path} cannot be loaded as a masked diffusion model: {OTHERS['bd3lm']}")
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    if not backbone and "vocab_embed.embedding" in state and settings.get("model_type") != "mdlm":
        raise ValueError(
            f"{path} has MDLM's names without 'backbone.' before them, as SEDD's weights have ({OTHERS['sedd']}). If"
            ' they are MDLM\'s, say so by "model_type": "mdlm" in a config.json beside them'
        )
    backbone = backbone or dict(state)
    if "vocab_embed.embedding" not in backbone:
        found = ", ".join(sorted(state)[:3]) or "none"
        raise ValueError(f"{path} is neither an mdkern checkpoint nor laid out as MDLM's; its first weights: {found}")
    if backbone["vocab_embed.embedding"].ndim != 2:
        raise ValueError(f"{path} has an embedding of shape {tuple(backbone['vocab_embed.embedding'].shape)}")
    if not any("adaLN_modulation" in name for name in backbone):
        raise ValueError(
            f"{path} has no adaLN modulations, as BD3-LM and autoregressive models with adaln=False:"
            f" {OTHERS['bd3lm']}, and mdkern samples neither"
        )
    weights = {}
    for name, tensor in backbone.items():
        for theirs, ours in NAMES.items():
            name = re.sub(rf"^{theirs}", ours, name)
        weights[name] = tensor
    weights.pop("rotary_emb.inv_freq", None)
    needed = ("time_embedding.out.weight", "blocks.0.mlp_up.weight")
    missing = [name for name in needed if name not in weights or weights[name].ndim != 2]
    if missing:
        raise ValueError(f"{path} is laid out as MDLM's but not whole: missing {missing}")
    if any(not re.match(r"blocks\.\d{1,6}\.", name) for name in weights if name.startswith("blocks.")):
        raise ValueError(f"{path} is laid out as MDLM's but has blocks without numbers")
    return weights


@torch.no_grad()
def without_time(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same function at sigma = 0, with constant modulations."""
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
