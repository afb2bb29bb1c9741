"""The authors' own code of LLaDA, Dream, SDAR and LLaDA 2 with random weights, from a folder that a user fills.

None of it is part of this repository. A folder for each family holds the modelling code that comes with the checkpoint
and the loops of the authors' repository:

    llada/   configuration_llada.py modeling_llada.py (GSAI-ML/LLaDA-8B-Instruct),
             generate.py eval_llada.py (github.com/ML-GSAI/LLaDA)
    dream/   configuration_dream.py modeling_dream.py generation_utils.py (Dream-org/Dream-v0-Instruct-7B)
    sdar/    configuration_sdar.py modeling_sdar.py fused_linear_diffusion_cross_entropy.py (JetLM/SDAR-4B-Chat),
             generate.py (github.com/JetAstra/SDAR)
    llada2/  configuration_llada2_moe.py modeling_llada2_moe.py (inclusionAI/LLaDA2.0-mini)
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.models.hf.compat import old_model_code

# The published configs, as far as the classes' defaults differ from them.
TRUE: dict[str, dict[str, Any]] = {
    "llada": {
        "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_ratio": 4, "mlp_hidden_size": 12288,
        "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096, "mask_token_id": 126336,
        "eos_token_id": 126081, "pad_token_id": 126081,
    },
    "dream": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "mask_token_id": 151666, "eos_token_id": 151643, "pad_token_id": 151643,
    },
    "sdar": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
        "mask_token_id": 151669, "eos_token_id": 151643, "pad_token_id": 151643,
    },
    "llada2": {
        "vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256,
        "num_experts_per_tok": 8, "num_shared_experts": 1, "moe_intermediate_size": 512, "n_group": 8, "topk_group": 4,
        "max_position_embeddings": 16384, "mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892,
    },
}  # fmt: skip
_QWEN_TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "mask_token_id": 511, "eos_token_id": 510,
    "pad_token_id": 510,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llada": {
        "d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_ratio": 4, "mlp_hidden_size": 96,
        "vocab_size": 512, "embedding_size": 512, "max_sequence_length": 512, "mask_token_id": 511,
        "eos_token_id": 510, "pad_token_id": 510,
    },
    "dream": _QWEN_TINY,
    "sdar": _QWEN_TINY | {"head_dim": 16},
    "llada2": _QWEN_TINY | {
        "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1,
        "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
    },
}  # fmt: skip
COMMON: dict[str, dict[str, Any]] = {
    "llada": {
        "activation_type": "silu", "block_type": "llama", "rope": True, "rope_theta": 500000.0,
        "rope_full_precision": True, "layer_norm_type": "rms", "layer_norm_with_affine": True, "rms_norm_eps": 1e-5,
        "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False, "attention_layer_norm": False,
        "alibi": False, "attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0,
        "input_emb_norm": False, "weight_tying": False, "scale_logits": False, "use_cache": False,
        "flash_attention": False, "multi_query_attention": None, "block_group_size": 1, "init_device": "cpu",
    },
    "dream": {"rope_theta": 1e6, "tie_word_embeddings": False, "attn_implementation": "sdpa"},
    "sdar": {
        "rope_theta": 1e6, "tie_word_embeddings": False, "attn_implementation": "sdpa", "sliding_window": None,
        "block_size": 4, "fuse_cross_entropy": False,
    },
    "llada2": {
        "rope_theta": 600000.0, "attn_implementation": "sdpa", "use_cache": False, "first_k_dense_replace": 1,
        "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    },
}  # fmt: skip
CLASSES = {  # of each family: the module and the class of its config, and of its model
    "llada": ("configuration_llada.LLaDAConfig", "modeling_llada.LLaDAModelLM"),
    "dream": ("configuration_dream.DreamConfig", "modeling_dream.DreamModel"),
    "sdar": ("configuration_sdar.SDARConfig", "modeling_sdar.SDARForCausalLM"),
    "llada2": ("configuration_llada2_moe.LLaDA2MoeConfig", "modeling_llada2_moe.LLaDA2MoeModelLM"),
}


def settings(family: str, tiny: bool) -> dict[str, Any]:
    """The config of a family at its true or at a tiny size."""
    return COMMON[family] | (TINY if tiny else TRUE)[family]


def missing(peers: Path | None, family: str, *files: str) -> str | None:
    """Why a family's own code cannot be run; None if it can."""
    if peers is None:
        return "no folder of the authors' code was given (--peers)"
    wanted = [name.split(".")[0] + ".py" for name in CLASSES[family]] + list(files)
    absent = [name for name in wanted if not (peers / family / name).exists()]
    return f"{peers / family} has no {', '.join(absent)}" if absent else None


def load(peers: Path, family: str, module: str) -> ModuleType:
    """A module of a family's folder."""
    package = f"published_{family}_{zlib.crc32(str(peers.resolve()).encode())}"
    if package not in sys.modules:
        made = ModuleType(package)
        made.__path__ = [str(peers / family)]
        sys.modules[package] = made
    with flash_attention(), bare_names(peers / family):
        return importlib.import_module(f"{package}.{module}")


@contextmanager
def bare_names(folder: Path) -> Iterator[None]:
    """Inside this context the scripts of a folder import each other by their bare names, as the authors run them."""
    names = {path.stem for path in folder.glob("*.py")}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names & sys.modules.keys():
            del sys.modules[name]


def build(peers: Path, family: str, tiny: bool, device: str) -> Any:
    """A family's model of its own code, with random weights made on the device, in bfloat16 on a GPU.

    LLaDA 2 is in bfloat16 everywhere, as its loop makes a mask of attention in that type. No text has the mask in it,
    as the mask's row of the output layer is zero, which is never the largest logit.
    """
    config_class, model_class = (name.split(".") for name in CLASSES[family])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" or family == "llada2" else torch.float32)
    try:
        with old_model_code(), torch.device(device):
            config = getattr(load(peers, family, config_class[0]), config_class[1])(**settings(family, tiny))
            module = load(peers, family, model_class[0])
            kind = getattr(module, model_class[1])
            if family == "llada":  # its class would build the network on the CPU
                inner = module.create_model_config_from_pretrained_config(config)
                inner.init_device = device
                model = kind(config, model=module.LLaDAModel(inner, init_params=False))
            else:
                model = kind(config)
    finally:
        torch.set_default_dtype(before)
    return with_random_weights(model.eval(), config.mask_token_id)


def with_random_weights(model: Any, mask_id: int) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.28 * weight.shape[-1] ** -0.5)  # 0.02 at a width of 4,096
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
        model.get_output_embeddings().weight[mask_id] = 0.0
    return model.requires_grad_(False)


@contextmanager
def flash_attention() -> Iterator[None]:
    """Inside this context SDAR's code can be imported without flash-attn and einops.

    PyTorch's functions take the place of flash-attn's: `scaled_dot_product_attention`, which runs FlashAttention 2 in
    16 bits where nothing is masked, and `rms_norm`.
    """
    made: dict[str, ModuleType] = {}
    if importlib.util.find_spec("flash_attn") is None:
        names: dict[str, dict[str, Any]] = {
            "flash_attn": {"flash_attn_func": attention, "flash_attn_varlen_func": None},
            "flash_attn.bert_padding": dict.fromkeys(("index_first_axis", "pad_input", "unpad_input")),
            "flash_attn.ops": {},
            "flash_attn.ops.triton": {},
            "flash_attn.ops.triton.layer_norm": {"rms_norm_fn": rms_norm},
        }
        for name, values in names.items():
            made[name] = ModuleType(name)
            made[name].__dict__.update(values)
    if importlib.util.find_spec("einops") is None:
        made["einops"] = ModuleType("einops")
        made["einops"].__dict__["rearrange"] = join_heads
    added = {name: module for name, module in made.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float) -> Tensor:
    """flash-attn's `flash_attn_func`: tensors ``[B, L, H, D]``, fewer heads of keys and values allowed."""
    queries, keys, values = (part.transpose(1, 2) for part in (query, key, value))
    options: dict[str, Any] = {"is_causal": causal, "scale": softmax_scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(queries, keys, values, **options).transpose(1, 2)


def rms_norm(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def join_heads(hidden: Tensor, pattern: str) -> Tensor:
    """einops' `rearrange`, for the two patterns that SDAR's code uses outside of training."""
    if pattern == "b h l d -> b l (h d)":
        hidden = hidden.transpose(1, 2)
    elif pattern != "b l h d -> b l (h d)":
        raise ValueError(f"install einops: its stand-in does not know {pattern!r}")
    return hidden.flatten(2)


@contextmanager
def old_caches() -> Iterator[None]:
    """Inside this context a `DynamicCache` can be asked for a layer by its number, as in transformers 4."""
    from transformers import DynamicCache

    if hasattr(DynamicCache, "__getitem__"):
        yield
        return
    added: Any = DynamicCache
    added.__getitem__ = lambda cache, layer: (cache.layers[layer].keys, cache.layers[layer].values)
    try:
        yield
    finally:
        del added.__getitem__


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The list that is given holds one entry for each pass of the model inside this context."""
    calls: list[int] = []
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()
