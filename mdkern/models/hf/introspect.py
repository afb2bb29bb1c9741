"""What people's models tell of themselves: their call's parameters, their configuration, their output layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def accepted_arguments(model: Callable[..., Any]) -> set[str]:
    """Names of the parameters that a model's call takes."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return set()


def first_setting(model: Any, *names: str) -> Any:
    """The first of these settings that the model's config has and that is not None."""
    config = getattr(model, "config", None)
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def longest_input(model: Any) -> int | None:
    """Positions that a Hugging Face model can read. RoBERTa's first ones are taken: its positions count from
    `padding_idx` + 1."""
    positions = first_setting(model, "max_position_embeddings", "max_sequence_length")
    for module in model.modules() if isinstance(model, nn.Module) else ():
        table = getattr(module, "position_embeddings", None)
        if positions is not None and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return positions - table.padding_idx - 1
    return positions


def end_of_text(model: Any, vocab_size: int, mask_id: int) -> tuple[int, ...]:
    """The config's ids for the end of text, without those that no logits can give."""
    told = first_setting(model, "eos_token_id")
    ids = told if isinstance(told, list | tuple) else [told]
    return tuple(dict.fromkeys(id for id in ids if isinstance(id, int) and 0 <= id < vocab_size and id != mask_id))


def output_layer(model: Any) -> nn.Module | str:
    """The layer from hidden states to logits, or why there is none whose weight could be used as it is."""
    find = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, nn.Module) or find is None:
        return "it has no get_output_embeddings"
    try:
        layer = find()
    except Exception as error:  # somebody's code, e.g. NotImplementedError
        return f"its get_output_embeddings raised {type(error).__name__}"
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Module) or not isinstance(weight, Tensor) or weight.ndim != 2:
        return "its output embedding is no linear layer"
    if type(layer) not in (nn.Linear, nn.Embedding) and type(layer).forward is not nn.Linear.forward:
        return f"its output embedding is a {type(layer).__name__}, not a plain linear layer"
    if not weight.is_floating_point() or weight.element_size() < 2 or type(weight.detach()) is not Tensor:
        return f"its output embedding holds {weight.dtype} in a {type(weight).__name__}"
    return layer
