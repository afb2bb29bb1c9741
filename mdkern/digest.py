"""Digests of values and of weights. Processes that hold equal values get equal digests, whatever their device."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from mdkern.models import Denoiser

CHUNK = 1 << 22  # 64-bit words that are hashed at once, which bounds a temporary to 32 MB
MIX = 0x2545F4914F6CDD1D, 0x369DEA0F31A53F85  # odd multipliers below 2^63, of L'Ecuyer (1999), tables of LCGs


def digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value: numbers, texts, tensors, containers, dataclasses, functions, objects.

    An object is hashed by its type and attributes, a function by its code, defaults and enclosed variables, a tensor by
    dtype, shape and elements. Memory addresses are never hashed.
    """
    sha = hashlib.sha256()
    for part in canonical(value, ()):
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def canonical(value: Any, inside: tuple[int, ...]) -> Iterator[bytes | memoryview]:
    """The bytes of a value, in pieces. `inside`: ids of the objects around it, so that circular references end."""
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        yield repr(value).encode()
        return
    if isinstance(value, bytes):
        yield value
        return
    if id(value) in inside:
        yield b"circle"
        return
    inside = (*inside, id(value))
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        return
    for part in parts_of(value):
        yield from canonical(part, inside)


def parts_of(value: Any) -> Any:
    """The parts of a composed value."""
    if isinstance(value, Mapping):
        return [part for pair in sorted(value.items(), key=lambda pair: digest(pair[0])) for part in pair]
    if isinstance(value, list | tuple):
        return [len(value), *value]
    if isinstance(value, set | frozenset):
        return sorted(map(digest, value))
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, FunctionType):
        enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, enclosed
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_consts
    if isinstance(value, type):
        return [f"{value.__module__}.{value.__qualname__}"]
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    if hasattr(value, "__dict__"):
        return [vars(value)]
    try:
        return [pickle.dumps(value)]
    except Exception:  # an object's own pickling may raise anything; then only its type is hashed
        return []


def model_digest(denoiser: Denoiser) -> str:
    """SHA-256 of all that determines a denoiser's output: name, dtype, shape and bits of every weight, and settings.

    Each weight is reduced to 64 bits on its own device, with one synchronisation for all of them.
    """
    described, sums = [], []
    for name, weight in [*denoiser.named_weights(), ("head bias", denoiser.head.bias)]:
        described.append((name, str(weight.dtype), tuple(weight.shape)))
        sums.append(word_sum(weight.detach()).to(denoiser.device))
    head = denoiser.head
    settings = denoiser.vocab_size, denoiser.mask_id, denoiser.time_conditioning, denoiser.block_causal
    rounding = [] if denoiser.precision is None else [denoiser.precision]
    rounding += [] if denoiser.head_precision is None else [f"head {denoiser.head_precision}"]
    shape = (head.scale, head.soft_cap, *rounding)
    return digest((settings, shape, model_settings(denoiser), described, torch.stack(sums)))


def model_settings(denoiser: Denoiser) -> Any:
    """The configuration of the model behind a denoiser, if it has one: ours or one of transformers."""
    config = getattr(getattr(denoiser, "model", None), "config", None)
    if config is not None and hasattr(
        config, "to_dict"
    ):  # settings that begin with "_" say where it came from and how it is run
        return {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return config if is_dataclass(config) else None


def word_sum(weight: Tensor) -> Tensor:
    """A sum over a tensor's 64-bit words, each mixed with its index, as an int64 scalar on the tensor's device.

    The arithmetic is modulo 2^64, so the order of additions does not matter, but the order of the elements does.
    """
    words = as_words(weight)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for first in range(0, len(words), CHUNK):
        part = words[first : first + CHUNK]
        place = torch.arange(first + 1, first + 1 + len(part), device=weight.device)
        mixed = (part ^ place.mul_(MIX[0])).mul_(MIX[1])
        mixed ^= mixed >> 32  # carries the upper bits to the lower ones, as multiplication only goes up
        total += mixed.mul_(MIX[0]).sum()
    return total


def as_words(weight: Tensor) -> Tensor:
    """A tensor's bytes as int64 ``[words]``, padded with zeros to a multiple of eight bytes; not copied if none are."""
    flat = weight.contiguous().flatten().view(torch.uint8)
    missing = math.ceil(len(flat) / 8) * 8 - len(flat)
    if missing or flat.data_ptr() % 8:
        flat = torch.cat((flat, flat.new_zeros(missing)))
    return flat.view(torch.int64)
