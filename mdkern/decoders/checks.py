"""Checks of decoders' parameters, and of what decoders return."""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, View
from mdkern.kernels.head.arguments import Of


def check_number(
    name: str, value: Any, low: float, high: float = inf, *, above: bool = False, below: bool = False
) -> None:
    """Refuse a value that is not a number from `low` to `high`; `above` and `below` exclude these two.

    Raises:
        ValueError: with the interval and the value.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low) or (below and value == high):
        interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
        raise ValueError(f"{name} must lie in {interval}, not {value!r}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is not one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_of(of: Any) -> None:
    """Refuse a value that is not one of those of `Stepwise.of`."""
    check_choice("of", of, get_args(Of))


def check_answers(decoder: Any, view: View, choice: Choice, edited: Tensor | None, remasked: Tensor | None) -> None:
    """Check the dtypes and shapes of what a decoder returned, which needs no synchronisation.

    Raises:
        ValueError: with the dtype and shape that are needed.
    """
    wanted: list[tuple[str, Tensor | None, torch.dtype]] = [
        ("choose's scores", choice.scores, torch.float32),
        ("choose's candidates", choice.candidates, torch.bool),
        ("edit", edited, torch.bool),
        ("remask", remasked, torch.bool),
    ]
    for name, answer, dtype in wanted:
        if answer is not None and (answer.shape != view.ids.shape or answer.dtype != dtype):
            raise ValueError(
                f"{type(decoder).__name__}: {name} must be {dtype} {list(view.ids.shape)},"
                f" not {answer.dtype} {list(answer.shape)}"
            )
