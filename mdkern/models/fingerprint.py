"""Fingerprints of models: a graph captured with a model is used again only while its fingerprint is the same."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, ref

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

    It changes when a module or its class is replaced, a class gets another forward, an adapter is switched on, a
    parameter is assigned anew, or a config of transformers or a dataclass, which a module has as its ``config``, is
    changed. Settings inside other objects are not examined. It is None for plain functions, which cannot be examined;
    their graphs serve one call only.

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
    configs: tuple[Any, ...]
    settings: tuple[str, ...]  # those in the configs
    snapshot: Snapshot | None  # None if it cannot be taken: the module is then described whenever it is looked at
    made: dict[Hashable, Any]  # see `remembered`

    def still_holds(self) -> bool:
        same = self.snapshot is not None and self.snapshot.still_holds()
        return same and settings_of(self.configs) == self.settings


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
    known = _known.get(model)
    if known is not None and known.still_holds():
        return known.mark
    configs = configs_of(model)
    settings = settings_of(configs)
    with no_collection():  # which the many tuples would set off, and which takes longer than they do
        mark = Mark((settings, describe_modules(model)))
        snapshot = None if leads_back(model) else snapshot_of(model)
    if known is not None and known.mark == mark:  # perhaps with other tensors at the same addresses
        mark = known.mark
    _known[model] = Known(mark, configs, settings, snapshot, {})
    return mark


def configs_of(model: nn.Module) -> tuple[Any, ...]:
    """The configs of a model and the modules in it: transformers has one for all of them."""
    found = getattr(model, "config", None), *(vars(module).get("config") for module in model.modules())
    return tuple({id(config): config for config in found if is_config(config)}.values())


def is_config(config: Any) -> bool:
    known = hasattr(config, "to_dict") or is_dataclass(config) or isinstance(config, SimpleNamespace)
    return known and hasattr(config, "__dict__")


def settings_of(configs: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple([repr(vars(config)) for config in configs])


def describe_modules(model: nn.Module) -> Hashable:
    modules: list[Hashable] = [tuple(forwards_of({type(module) for module in model.modules()}).items())]
    for name, module in model.named_modules():
        own = [
            (attribute, describe(value))
            for attribute, value in vars(module).items()
            if attribute != "_modules" and (type(value) not in TABLES or value)
        ]
        modules.append((name, type(module), tuple(own)))
    return tuple(modules)


def forwards_of(kinds: Iterable[type]) -> dict[type, Any]:
    """What each class has as its forward; a class may get another one."""
    return {
        kind: next((vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base)), None) for kind in kinds
    }


def snapshot_of(model: nn.Module) -> Snapshot | None:
    """None for a module with tensors of a kind that has no address."""
    try:
        return Snapshot(model)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def leads_back(model: nn.Module) -> bool:
    """Whether what a snapshot holds may hold the model itself, which would then never be freed."""

    looked_at: set[int] = set()
    waiting: list[Any] = []
    for module in model.modules():
        own = vars(module)
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return True
        waiting.append(own)
    while waiting:
        value = waiting.pop()
        if value is model:
            return True
        if id(value) not in looked_at and (inside := held_by(value)):
            looked_at.add(id(value))
            waiting += inside
    return False


def held_by(value: Any) -> Collection[Any]:
    """What a container, a function or an object holds, but for modules and tensors."""
    kind = type(value)
    if kind in TABLES:
        return value.values() if isinstance(value, dict) else value
    if kind in (list, tuple):
        return value
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if kind is MethodType:
        return (value.__self__,)
    if kind is FunctionType:
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
    if kind in PLAIN or isinstance(value, nn.Module | Tensor | type | ModuleType):
        return ()
    own = getattr(value, "__dict__", None)
    return (own,) if own else ()


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
        self.roots = [ref(part) for part in parts]
        self.inside = [module for module in modules if all(module is not part for part in parts)]
        self.kinds = self.kinds_now()
        self.forwards = forwards_of(set(self.kinds))
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

    def kinds_now(self) -> list[type]:
        """The classes of the modules, which may be given other ones."""
        return [*(type(root()) for root in self.roots), *map(type, self.inside)]

    def where(self) -> list[Any]:
        places: list[Any] = []  # flat: as many tuples would be as many things to collect
        for tensors in (*(table.values() for table in self.held), self.loose):
            for part in tensors:
                if part is not None:
                    places += id(part), part.data_ptr(), part.dtype, part.shape, part.stride()
        return places

    def still_holds(self) -> bool:
        """Whether all attributes, tensors, modules, classes and hooks are the same, and the tensors where they were."""
        try:
            with no_collection():  # which as many sizes would set off, and which takes longer the more is held
                same = not any(self.empty) and all(table == kept for table, kept in self.seen)
                same = same and self.kinds_now() == self.kinds and forwards_of(self.forwards) == self.forwards
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
