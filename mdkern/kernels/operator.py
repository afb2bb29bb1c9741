"""Registers operators with `torch.library`. The schema is written once, as the signature of the reference."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from pkgutil import resolve_name
from typing import Any, get_type_hints

import torch
from torch import Tensor

from mdkern.kernels.device import has_triton

NO_DEFAULT = inspect.Parameter.empty


def operator(
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernels: str,
    mutates: Collection[str] = (),
    name: str = "",
) -> Any:
    """Register ``mdkern::name`` and return the function that calls it, with positional arguments.

    `torch.library` only has flat lists of arguments. A parameter of `reference` that is a NamedTuple stands for its
    fields: the caller unpacks it (``op(hidden, *head)``), and the three implementations are given the NamedTuple. All
    are called with the same arguments.

    Args:
        reference: the operator in plain PyTorch. Its annotations and defaults are the schema. It runs on the CPU and
            on GPUs without Triton. The device is that of the first argument, a tensor.
        fake: returns empty outputs of the right shapes and dtypes, for `torch.compile` and `torch.export`.
        kernels: ``"module:function"``, the launcher on a GPU. It is imported when first needed, as it imports Triton.
        mutates: names of arguments, or of fields of NamedTuples, that are written in place.
        name: the operator's name; default: that of the reference.
    """
    bundles, parameters = expand(reference)
    defaults = tuple(parameter.default for parameter in parameters)

    def whole(flat: tuple[Any, ...]) -> list[Any]:
        """The arguments as `reference` takes them. PyTorch leaves out trailing arguments that equal their defaults."""
        rest = iter(flat + defaults[len(flat) :])
        return [next(rest) if fields is None else fields(*(next(rest) for _ in fields._fields)) for fields in bundles]

    def on_cpu(*flat: Any) -> Any:
        return reference(*whole(flat))

    def on_gpu(first: Tensor, *rest: Any) -> Any:
        implementation = resolve_name(kernels) if has_triton(first.device) else reference
        return implementation(*whole((first, *rest)))

    hint = get_type_hints(reference)["return"]
    returns = None if hint is type(None) else hint
    on_cpu.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    registered = torch.library.custom_op(f"mdkern::{name or reference.__name__}", on_cpu, mutates_args=tuple(mutates))
    registered.register_kernel("cuda")(on_gpu)
    registered.register_fake(lambda *flat: fake(*whole(flat)))
    for implementation in getattr(registered, "_backend_fns", {}).values():
        hide_lazily(implementation)
    return registered


def hide_lazily(implementation: Callable[..., Any]) -> None:
    """Let an operator's implementation be hidden from torch.compile's tracer only in processes that have imported it.

    Otherwise PyTorch imports the compiler at the operator's first call, which takes seconds. The names are private; in
    a version without them nothing changes.
    """
    plain = getattr(implementation, "__wrapped__", None)
    if plain is None:
        return
    hidden: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal hidden
        if "torch._dynamo" not in sys.modules:
            return plain(*args, **kwargs)
        if hidden is None:
            import torch._dynamo

            hidden = torch._dynamo.disable(plain, wrapping=False)
        return hidden(*args, **kwargs)

    setattr(plain, "__dynamo_disable", call)


def expand(function: Callable[..., Any]) -> tuple[list[Any], list[inspect.Parameter]]:
    """The NamedTuple of each parameter of `function`, or None; and the parameters with NamedTuples replaced by fields.

    A field whose name is taken already gets the parameter's name as a prefix, so that ``other: Head`` gives
    ``other_weight``. Defaults are kept where no later parameter is without one, as a flat signature requires.
    """
    bundles: list[Any] = []
    flat: list[inspect.Parameter] = []
    hints = get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        fields = get_type_hints(kind) if hasattr(kind, "_fields") else None
        bundles.append(None if fields is None else kind)
        for name, hint in ({parameter.name: kind} if fields is None else fields).items():
            default = parameter.default if fields is None else kind._field_defaults.get(name, NO_DEFAULT)
            taken = any(name == other.name for other in flat)
            full = f"{parameter.name}_{name}" if taken else name
            flat.append(parameter.replace(name=full, annotation=hint, default=default))
    needed = [place for place, parameter in enumerate(flat) if parameter.default is NO_DEFAULT]
    for place in range(max(needed, default=0)):
        flat[place] = flat[place].replace(default=NO_DEFAULT)
    return bundles, flat
