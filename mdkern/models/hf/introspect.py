"""Reads facts from models: the parameters of their call, their configuration, their output layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import is_whole, listed
from mdkern.models.fingerprint import remembered


def accepted_arguments(model: Callable[..., Any]) -> set[str]:
    """Names of the parameters of a model's call, including those that a wrapper passes on by ``**kwargs``."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return set()
    inside = wrapped_model(model)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return set(parameters) | (accepted_arguments(inside) if passes_on and inside is not None else set())


def wrapped_model(model: Any) -> nn.Module | None:
    """The model inside a wrapper of PEFT, torch.compile, data parallelism or weight averaging; None if it is none."""
    find = getattr(model, "get_base_model", None)
    if isinstance(model, nn.Module) and callable(find):
        inside = find()
    else:
        inside = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return inside if isinstance(inside, nn.Module) and inside is not model else None


def check_evaluating(model: Any) -> None:
    """Refuse a module in training mode, and one inside it that then drops something or counts a batch's statistics.

    Raises:
        ValueError: there is one. Others inside it may be in training mode, as a layer is that was put in later.
    """
    kinds = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm

    def check() -> None:
        for name, part in model.named_modules():
            if part.training and (not name or isinstance(part, kinds)):
                which = f", {name} in it" if name else ""
                raise ValueError(f"model is in training mode{which}, so dropout would be on: call model.eval() first")

    if isinstance(model, nn.Module):
        remembered(model, check_evaluating, check)


def execution_device(model: Any) -> torch.device | None:
    """The device for a module's ids: that of its weights or, if accelerate keeps them elsewhere, that where it runs."""

    def find() -> torch.device | None:
        for module in model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        parameter = next(model.parameters(), None)
        return None if parameter is None else parameter.device

    return remembered(model, execution_device, find) if isinstance(model, nn.Module) else None


def first_position(model: Any) -> int:
    """The position id of a text's first token: RoBERTa's relatives count from `padding_idx` + 1."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return int(table.padding_idx) + 1
    return 0


def first_setting(model: Any, *names: str) -> Any:
    """The first of these settings of the model's config that is not None."""
    config = getattr(model, "config", None)
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def longest_input(model: Any) -> int | None:
    """The most positions that a Hugging Face model can read; None if its config does not say."""
    positions = first_setting(model, "max_position_embeddings", "max_sequence_length")
    if not isinstance(positions, int) or positions < 1:  # XLNet's -1 says that there is no limit
        return None
    return positions - first_position(model)


def end_of_text(model: Any, vocab_size: int, mask_id: int) -> tuple[int, ...]:
    """The ends of text of the config and the generation config, without ids that cannot be drawn."""
    configs = getattr(model, "config", None), getattr(model, "generation_config", None)
    told = [item for config in configs for item in listed(getattr(config, "eos_token_id", None))]
    ids = [int(item) for item in told if is_whole(item)]
    return tuple(dict.fromkeys(item for item in ids if 0 <= item < vocab_size and item != mask_id))


# model_type of models that see the blocks up to a position's own, and the length of their blocks if the config does not
# say it. SDAR: Cheng et al., 2510.06303; LLaDA 2: 2512.15745; Fast-dLLM v2: Wu et al., 2509.26328.
BLOCK_CAUSAL = {"sdar": 4, "sdar_moe": 4, "llada2": 32, "llada2_moe": 32, "fast_dllm_qwen": 32}
BLOCK_SETTINGS = ("block_size", "bd_size", "block_length")
SHIFTED = ("dream", "fast_dllm_qwen")  # model_type of models whose logits are for the next position


def model_type(model: Any) -> str:
    return str(first_setting(model, "model_type") or "").lower()


def block_setting(model: Any) -> tuple[str, int] | None:
    """The setting of a model's config that is a length of blocks shorter than its texts, and that length."""
    longest = longest_input(model) or 1024
    found = ((name, first_setting(model, name)) for name in BLOCK_SETTINGS)
    return next(((name, length) for name, length in found if is_whole(length) and 1 <= length < longest), None)


def own_blocks(model: Any) -> int | None:
    """The length of the blocks of a model that is known to be block-causal; None for others."""
    told = block_setting(model)
    return None if model_type(model) not in BLOCK_CAUSAL else told[1] if told else BLOCK_CAUSAL[model_type(model)]


class OutputLayer(NamedTuple):
    """The layer from hidden states to logits."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


def output_layer(model: Any) -> OutputLayer | str:
    """The output layer, or why there is none whose weight could be used as it is."""
    find = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or find is None:
        return "it has no get_output_embeddings"
    try:
        layer = find()
    except Exception as error:  # the model's own code may raise anything, e.g. NotImplementedError
        return f"its get_output_embeddings raised {type(error).__name__}"
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Module) or not isinstance(weight, Tensor) or weight.ndim != 2:
        return "its output embedding is no linear layer"
    if type(layer) not in (nn.Linear, nn.Embedding) and type(layer).forward is not nn.Linear.forward:
        return f"its output embedding is a {type(layer).__name__}, not a plain linear layer"
    if not weight.is_floating_point() or weight.element_size() < 2 or type(weight.detach()) is not Tensor:
        return f"its output embedding holds {weight.dtype} in a {type(weight).__name__}"
    bias = getattr(layer, "bias", None)
    return OutputLayer(weight, bias if isinstance(bias, Tensor) else None)
