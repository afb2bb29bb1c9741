"""What a captured graph takes for constant of a model, so that a change of it is noticed."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head


def fingerprint(model: Any) -> Hashable:
    """What a captured graph takes for constant of a model: addresses of tensors, settings, which modules.

    A module replaced, an adapter switched on, a parameter assigned anew, a transformers config changed: all change it.
    Settings inside other objects are not looked into. None for plain functions, which nothing can be told of: their
    graphs serve one call only.
    """
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)  # of transformers: one for all its modules
        settings = repr(vars(config)) if hasattr(config, "to_dict") else None
        modules = tuple((name, type(module), describe(own(module))) for name, module in model.named_modules())
        return settings, modules
    if isinstance(model, Denoiser):
        parts = (
            fingerprint(value) if isinstance(value, nn.Module) else describe(value) for value in vars(model).values()
        )
        return type(model), tuple(parts)
    return None


def own(module: nn.Module) -> dict[str, Any]:
    """A module's attributes without its submodules."""
    return {name: value for name, value in vars(module).items() if name != "_modules"}


def describe(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        try:
            return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
        except (NotImplementedError, RuntimeError, TypeError, ValueError):  # sparse ones, and those of other libraries
            return id(value)
    if isinstance(value, dict):
        return tuple((key, describe(item)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(describe(item) for item in value)
    if isinstance(value, Head):
        return describe(vars(value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), value
    return id(value)
