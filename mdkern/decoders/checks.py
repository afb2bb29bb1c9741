"""Checks of decoders' parameters, and of what decoders return."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from math import inf
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, Decoder, Proposal, View
from mdkern.kernels.head.arguments import Of


def check_number(
    decoder: Any, name: str, low: float, high: float = inf, *, above: bool = False, below: bool = False
) -> None:
    """Refuse a parameter that is not a number from `low` to `high`; `above` and `below` exclude these two.

    One of NumPy, or a fraction, becomes a float.

    Raises:
        ValueError: with the interval and the value.
    """
    value = getattr(decoder, name)
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low) or (below and value == high):
        interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
        raise ValueError(f"{name} must lie in {interval}, not {value!r}")
    object.__setattr__(decoder, name, float(value))


def check_whole(decoder: Any, name: str, least: int) -> None:
    """Refuse a parameter that is not a whole number of at least `least`; one of NumPy becomes an int."""
    value = getattr(decoder, name)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    object.__setattr__(decoder, name, int(value))


def check_flag(decoder: Any, name: str) -> None:
    """Refuse a parameter that is not a bool."""
    value = getattr(decoder, name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is not one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_of(of: Any) -> None:
    """Refuse a value that is not one of those of `Stepwise.of`."""
    check_choice("of", of, get_args(Of))


def copied(view: View) -> View:
    """A copy of a view for a decoder of the user's, which may write into it."""
    return View(**{field.name: getattr(view, field.name).clone() for field in fields(view)})


def copied_proposal(proposal: Proposal) -> Proposal:
    """A copy of a proposal for a decoder of the user's."""
    return Proposal(*(None if values is None else values.clone() for values in proposal))  # type: ignore[arg-type]


def check_rows(decoder: Any, view: View, rows: Any) -> Tensor:
    """The result of `Stepwise.rows` of a decoder of the user's, checked.

    Raises:
        ValueError: with the dtype and shape that are needed.
    """
    check_entries(decoder, "rows", view, rows, torch.bool)
    checked: Tensor = rows
    return checked


def check_answers(decoder: Any, view: View, choice: Any, edited: Any, remasked: Any, settled: Any) -> None:
    """Check the types, dtypes and shapes of what a decoder returned, which needs no synchronisation.

    Raises:
        ValueError: with what is needed.
    """
    if not isinstance(choice, Choice):
        raise ValueError(f"{type(decoder).__name__}: choose must return a Choice, not {type(choice).__name__}")
    check_entries(decoder, "choose's scores", view, choice.scores, torch.float32)
    check_entries(decoder, "choose's candidates", view, choice.candidates, torch.bool)
    for name, answer in (("edit", edited), ("remask", remasked)):
        if answer is not None:
            check_entries(decoder, name, view, answer, torch.bool)
    if settled is not None:
        check_tensor(decoder, "settled", settled, view.step.shape, torch.bool)


def check_entries(decoder: Any, name: str, view: View, answer: Any, dtype: torch.dtype) -> None:
    check_tensor(decoder, name, answer, view.ids.shape, dtype)


def check_tensor(decoder: Any, name: str, answer: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    if isinstance(answer, Tensor) and answer.shape == shape and answer.dtype == dtype:
        return
    given = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
    raise ValueError(f"{type(decoder).__name__}: {name} must be {dtype} {list(shape)}, not {given}")


def times_of(decoder: Decoder, steps: int) -> Tensor:
    """A decoder's `times`, float64 ``[steps + 1]``.

    Raises:
        ValueError: they are not that many.
    """
    times = decoder.times(steps)
    if not isinstance(times, Tensor) or tuple(times.shape) != (steps + 1,):
        given = list(times.shape) if isinstance(times, Tensor) else type(times).__name__
        raise ValueError(f"{type(decoder).__name__}: times must be [{steps + 1}] for {steps} steps, not {given}")
    return times
