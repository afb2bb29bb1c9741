"""Checks the models of a call: they must share vocabulary, mask id and device, and have finite weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from mdkern.engine.checks import refuse_class
from mdkern.models import Denoiser, adapt
from mdkern.models.denoiser import available_device, ids_of
from mdkern.models.fingerprint import UNKNOWN, at_one_moment, version_of
from mdkern.schedule import NAME, Schedule

# Weights that were found finite, by their ids, and their `version_of` then.
FINITE: dict[int, tuple[ref[Tensor], tuple[int, ...]]] = {}


def resolve_models(heavy: Any, light: Any, schedule: Any) -> tuple[dict[str, Denoiser], Schedule]:
    """The denoisers by their upper-case names in the schedule, and the schedule."""
    if schedule is None and isinstance(light, str | Schedule):
        light, schedule = None, light
    if isinstance(heavy, Mapping):
        if light is not None:
            raise ValueError("light must not be given when the first argument is a mapping of models: put it in there")
        if not heavy or not all(isinstance(name, str) and re.fullmatch(NAME, name) for name in heavy):
            names = ", ".join(map(repr, heavy)) or "nothing"
            raise ValueError(f"models must map at least one name, of letters only, to a model: it maps {names}")
        models = {name.upper(): model for name, model in heavy.items()}
        if len(models) < len(heavy):
            raise ValueError(f"model names must differ in more than their case: {', '.join(heavy)}")
    else:
        if isinstance(light, str | Schedule):
            raise ValueError(
                f"light must be a model, not {str(light)!r}: the schedule is given already, {str(schedule)!r}"
            )
        models = {"H": heavy} | ({"L": light} if light is not None else {})
    if schedule is None:
        if len(models) > 1:
            raise ValueError(
                f"schedule must be given to say when each of {', '.join(models)} runs, e.g. 'L32 H192 L32'"
            )
        schedule = Schedule.constant(next(iter(models)))
    elif isinstance(schedule, str):
        schedule = Schedule(schedule)
    elif not isinstance(schedule, Schedule):
        refuse_class("schedule", schedule)
        raise TypeError(f"schedule must be a Schedule or a text such as 'L32 H192 L32', not {type(schedule).__name__}")
    unknown = [name for name in schedule.models if name not in models]
    if unknown:
        raise ValueError(f"schedule {schedule} names {', '.join(unknown)}, but the models are {', '.join(models)}")
    with at_one_moment():
        denoisers = {name: adapt_named(name, models[name]) for name in schedule.models}
        check_models(denoisers)
    return denoisers, schedule


def adapt_named(name: str, model: Any) -> Denoiser:
    """`adapt` a model to a denoiser as the model is now. Errors name the model as the schedule does."""
    try:
        return adapt(model).current()
    except (TypeError, ValueError) as error:
        raise type(error)(f"model {name}: {error}") from error


def check_models(denoisers: Mapping[str, Denoiser]) -> None:
    """Refuse denoisers that do not fit together, or whose weights cannot be used."""
    first_name, first = next(iter(denoisers.items()))
    for name, denoiser in denoisers.items():
        for what in ("vocab_size", "mask_id", "device"):
            ours, theirs = getattr(denoiser, what), getattr(first, what)
            if ours != theirs:
                raise ValueError(
                    f"models must share their {what}: {name} has {ours}, {first_name} has {theirs}"
                    + (": move one of them" if what == "device" else ": their tokenizers differ")
                )
    available_device(first.device)
    for name, denoiser in denoisers.items():
        if hasattr(denoiser, "eos_id"):
            raise ValueError(f"model {name} sets eos_id: a Denoiser's ends of text are eos_ids, a tuple of ids")
        ids_of(f"model {name}'s eos_ids", denoiser.eos_ids, denoiser.vocab_size, denoiser.mask_id)
        if denoiser.device.type == "meta":
            raise ValueError(f"model {name} is on the meta device, which holds no weights: load them first")
        weight = denoiser.head.weight
        scaled = denoiser.head.weight_scale is not None
        if weight is not None and not scaled and not (weight.is_floating_point() and weight.element_size() > 1):
            raise ValueError(f"model {name} has a head of {weight.dtype}: at least 16 floating bits are needed")
        opened = open_ids(denoiser)
        if opened:
            what = "its mask id" if denoiser.mask_id in opened else "an id beyond its vocabulary,"
            raise ValueError(f"model {name} could draw {what} {opened[0]}: set its head's bias to -inf there")
        broken = not_finite(denoiser)
        if broken:
            raise ValueError(f"model {name} has NaN or infinite weights in {', '.join(broken[:3])}")


def open_ids(denoiser: Denoiser) -> list[int]:
    """The first of the mask and padded ids whose bias in the head is not -inf, so that it might be drawn; or none."""
    bias = denoiser.head.bias
    forbidden = torch.arange(len(bias), device=bias.device)
    forbidden = (forbidden == denoiser.mask_id) | (forbidden >= denoiser.vocab_size)
    found: list[int] = (forbidden & (bias != -torch.inf)).nonzero()[:1, 0].tolist()
    return found


def not_finite(denoiser: Denoiser) -> list[str]:
    """Names of the weights that hold a NaN or an infinity. One synchronisation for all weights.

    Weights of billions of parameters take milliseconds to read, so those that were finite are not read again while
    PyTorch counts no change of them. It does not count changes through ``.data``; the passes then notice.
    """
    weights = {name: weight for name, weight in denoiser.named_weights() if not known_finite(weight)}
    sizes = {name: largest_entry(weight, denoiser.device) for name, weight in weights.items()}
    largest = [size for size in sizes.values() if size is not None]
    if largest and not bool(torch.stack(largest).isfinite().all()):
        return [name for name, size in sizes.items() if size is not None and not bool(size.isfinite())]
    for weight in weights.values():
        if (version := version_of(weight)) != UNKNOWN:
            key = id(weight)
            FINITE[key] = ref(weight, lambda _, key=key: FINITE.pop(key, None)), version  # type: ignore[misc]
    return []


def known_finite(weight: Tensor) -> bool:
    found = FINITE.get(id(weight))
    return found is not None and found[0]() is weight and found[1] == version_of(weight)


def largest_entry(weight: Tensor, device: torch.device) -> Tensor | None:
    """The largest absolute value as float64 on `device`, NaN if the weight holds one; None if it cannot be computed.

    It cannot for weights without values here (on the meta device, or kept elsewhere by accelerate) and for formats of
    which PyTorch has no norm (8 bits, or those of quantisation libraries).
    """
    weight = weight.detach()
    floating = weight.is_floating_point() and weight.element_size() > 1
    if weight.device.type == "meta" or not floating or not weight.numel():
        return None
    try:
        return torch.linalg.vector_norm(weight, torch.inf).to(device, torch.float64)
    except (NotImplementedError, RuntimeError, TypeError):
        return None
