"""Fingerprints of models: a graph captured with a model is used again only while its fingerprint is the same."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head

TABLES = frozenset((dict, OrderedDict, set))  # a module has a dozen, most of them empty
UNKNOWN: tuple[int, ...] = ()
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
        with no_collection():  # which the many tuples would set off, and which takes longer than they do
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


@contextmanager
def no_collection() -> Iterator[None]:
    """Without garbage collection."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Snapshot:
    """What modules and those below them look like, to be compared with later: many times faster than `fingerprint`.

    It sees the same changes. It holds what it has seen, except for tensors: so it is taken of parts of a model, which
    do not keep the whole alive.
    """

    def __init__(self, *parts: nn.Module) -> None:
        modules = {id(module): module for part in parts for module in part.modules()}.values()
        self.seen: list[tuple[Any, Any]] = []
        self.held: list[Any] = []  # tables of parameters and buffers
        for module in modules:
            own = vars(module)
            tensors = module._parameters, module._buffers
            self.held += [table for table in tensors if table]
            tables = [own, *(value for value in own.values() if type(value) in TABLES)]
            self.seen += [(table, table.copy()) for table in tables if not any(table is part for part in tensors)]
        self.addresses = self.where()

    def where(self) -> list[int]:
        return [0 if tensor is None else tensor.data_ptr() for table in self.held for tensor in table.values()]

    def still_holds(self) -> bool:
        """Whether all attributes, modules and hooks are the same objects, and the tensors where they were."""
        try:
            return all(table == kept for table, kept in self.seen) and self.where() == self.addresses
        except (RuntimeError, TypeError, ValueError):  # another tensor or array, which `==` compares by entries
            return False


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


def version_of(weight: Tensor) -> tuple[int, ...]:
    """Changes with every change of a tensor that PyTorch counts."""
    try:
        return weight.data_ptr(), weight._version
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # inference tensors, other libraries' tensors
        return UNKNOWN
