"""Fingerprints of models: a graph captured with a model is used again only while its fingerprint is the same."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head

Made = TypeVar("Made")

TABLES = frozenset((dict, OrderedDict, set))  # a module has a dozen, most of them empty
CONTAINERS = TABLES | {list, tuple}
UNNOTED = (  # tables of a module that no pass reads, or only if another one has entries
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_non_persistent_buffers_set",
)
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

    That of a module is the same `Mark` while it does not change.
    """
    if isinstance(model, nn.Module):
        moment = _moments.known
        if moment is None:
            return mark_of_module(model)
        if id(model) not in moment:
            moment[id(model)] = mark_of_module(model)
        return moment[id(model)]
    if isinstance(model, Denoiser):
        parts = (
            fingerprint(value) if isinstance(value, nn.Module) else describe(value) for value in vars(model).values()
        )
        return type(model), tuple(parts)
    return None


class Known(NamedTuple):
    """What is known of a module: it has the mark while its settings are these and the snapshot holds."""

    mark: Mark
    settings: str | None
    snapshot: Snapshot | None  # None if it cannot be taken: the module is then described whenever it is looked at
    made: dict[Hashable, Any]  # see `remembered`


class Moments(threading.local):
    """The marks of modules by their ids, at the moment at which this thread is."""

    known: dict[int, Mark] | None = None


_known: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
_moments = Moments()


@contextmanager
def at_one_moment() -> Iterator[None]:
    """Inside this context every module is looked at once: nothing changes it meanwhile."""
    before = _moments.known
    _moments.known = {} if before is None else before
    try:
        yield
    finally:
        _moments.known = before


def forget() -> None:
    """Drop what is known of all modules. What was in them is held by it until they are looked at again."""
    _known.clear()


def remembered(model: nn.Module, key: Hashable, make: Callable[[], Made]) -> Made:
    """``make()``, which must not hold the module: what it gave for this key, if the module is as it was then.

    Its tensors are then the same objects, too.
    """
    mark, known = fingerprint(model), _known.get(model)
    if known is None or known.mark is not mark:  # it has changed within this moment
        return make()
    if key not in known.made:
        known.made[key] = make()
    made: Made = known.made[key]
    return made


def mark_of_module(model: nn.Module) -> Mark:
    """The same one while a snapshot of the module holds: a mixture of experts has ten thousands of modules."""
    config = getattr(model, "config", None)  # transformers has one for all modules of a model
    settings = repr(vars(config)) if hasattr(config, "to_dict") else None
    known = _known.get(model)
    if known is not None and known.snapshot is not None and known.settings == settings and known.snapshot.still_holds():
        return known.mark
    with no_collection():  # which the many tuples would set off, and which takes longer than they do
        mark = Mark((settings, describe_modules(model)))
        snapshot = None if leads_back(model) else snapshot_of(model)
    if known is not None and known.mark == mark:  # perhaps with other tensors at the same addresses
        mark = known.mark
    _known[model] = Known(mark, settings, snapshot, {})
    return mark


def describe_modules(model: nn.Module) -> Hashable:
    modules = []
    for name, module in model.named_modules():
        own = [
            (attribute, describe(value))
            for attribute, value in vars(module).items()
            if attribute != "_modules" and (type(value) not in TABLES or value)
        ]
        modules.append((name, type(module), tuple(own)))
    return tuple(modules)


def snapshot_of(model: nn.Module) -> Snapshot | None:
    """None for a module with tensors of a kind that has no address."""
    try:
        return Snapshot(model)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def leads_back(model: nn.Module) -> bool:
    """Whether what a snapshot holds may hold the model itself, which would then never be freed."""

    def is_back(value: Any) -> bool:
        if isinstance(value, partial):
            return any(map(is_back, (value.func, *value.args, *value.keywords.values())))
        return value is model or (isinstance(value, MethodType) and value.__self__ is model)

    for module in model.modules():
        own = vars(module)
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return True
        for value in own.values():
            if is_back(value) or (type(value) in (list, tuple) and any(map(is_back, value))):
                return True
    return False


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

    It sees the same changes of what a pass reads. It holds what it has seen, except for parameters and buffers, and not
    the modules that it is taken of, unless something in them does.
    """

    def __init__(self, *parts: nn.Module) -> None:
        modules = {id(module): module for part in parts for module in part.modules()}.values()
        self.seen: list[tuple[Any, Any]] = []
        self.empty: list[Any] = []  # tables in which there was nothing: most of a module's
        self.held: list[Any] = []  # tables of parameters and buffers
        self.loose: list[Tensor] = []  # tensors that are neither
        for module in modules:
            own = vars(module)
            tables = module._parameters, module._buffers
            self.held += [table for table in tables if table]
            self.note(own, {id(table) for table in (*self.held[-2:], *map(own.get, UNNOTED))})
        self.addresses = self.where()

    def note(self, container: Any, noted: set[int]) -> None:
        """A container, and all that are in it."""
        if id(container) in noted:
            return
        if not container:
            self.empty.append(container)
            return
        noted.add(id(container))
        if not isinstance(container, tuple):
            self.seen.append((container, container.copy()))
        for value in container.values() if isinstance(container, dict) else container:
            if type(value) in CONTAINERS:
                self.note(value, noted)
            elif isinstance(value, Tensor):
                self.loose.append(value)

    def where(self) -> list[Any]:
        places: list[Any] = []  # flat: as many tuples would be as many things to collect
        for tensors in (*(table.values() for table in self.held), self.loose):
            for part in tensors:
                if part is not None:
                    places += id(part), part.data_ptr(), part.dtype, part.shape, part.stride()
        return places

    def still_holds(self) -> bool:
        """Whether all attributes, tensors, modules and hooks are the same objects, and the tensors where they were."""
        try:
            with no_collection():  # which as many sizes would set off, and which takes longer the more is held
                same = not any(self.empty) and all(table == kept for table, kept in self.seen)
                return same and self.where() == self.addresses
        except (RuntimeError, TypeError, ValueError):  # another tensor or array, which `==` compares by entries
            return False


def describe(value: Any) -> Hashable:
    kind = type(value)
    if kind is Mark:
        return value
    if kind in PLAIN:
        return kind, value
    if isinstance(value, Tensor):
        try:
            return kind, value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
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
