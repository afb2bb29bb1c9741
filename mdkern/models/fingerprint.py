"""Fingerprints of models: a graph captured with a model is used again only while its fingerprint is the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head

TABLES = frozenset((dict, OrderedDict, set))  # a module has a dozen, most of them empty
PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device))


class Mark:
    """A hashable thing as a key of dictionaries that is asked for often: its hash is computed once.

    That of a fingerprint takes as long as a kernel, as Python does not keep the hashes of tuples.
    """

    def __init__(self, content: Hashable) -> None:
        self.content, self.hash = content, hash(content)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Mark) and self.hash == other.hash and self.content == other.content)


def fingerprint(model: Any) -> Hashable:
    """What a captured graph assumes not to change in a model: addresses of tensors, settings, and its modules.

    It changes when a module is replaced, an adapter is switched on, a parameter is assigned anew, or a transformers
    config is changed. Settings inside other objects are not examined. It is None for plain functions, which cannot be
    examined; their graphs serve one call only.
    """
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)  # transformers has one for all modules of a model
        settings = repr(vars(config)) if hasattr(config, "to_dict") else None
        modules = []
        for name, module in model.named_modules():
            own = [
                (attribute, describe(value))
                for attribute, value in vars(module).items()
                if attribute != "_modules" and (type(value) not in TABLES or value)
            ]
            modules.append((name, type(module), tuple(own)))
        return settings, tuple(modules)
    if isinstance(model, Denoiser):
        parts = (
            fingerprint(value) if isinstance(value, nn.Module) else describe(value) for value in vars(model).values()
        )
        return type(model), tuple(parts)
    return None


def describe(value: Any) -> Hashable:
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if isinstance(value, Tensor):
        try:
            return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
        except (NotImplementedError, RuntimeError, TypeError, ValueError):  # sparse tensors, and other libraries' ones
            return id(value)
    if isinstance(value, dict):
        return tuple([(key, describe(item)) for key, item in value.items()])
    if isinstance(value, list | tuple | set | frozenset):
        return tuple([describe(item) for item in value])
    if isinstance(value, Head):
        return describe(vars(value))
    if isinstance(value, bool | int | float | str):  # of a subclass
        return kind, value
    return id(value)
