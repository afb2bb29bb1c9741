"""Refusing parameters that cannot be right, and what decoders of one's own must not return."""

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
    """Refuse what is no number from `low` to `high`; `above` and `below` leave out the ends.

    Raises:
        ValueError: with the interval and the value.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low) or (below and value == high):
        interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
        raise ValueError(f"{name} must lie in {interval}, not {value!r}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse what is not one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_of(of: Any) -> None:
    """Refuse what is no `Stepwise.of`."""
    check_choice("of", of, get_args(Of))


def check_answers(decoder: Any, view: View, choice: Choice, edited: Tensor | None, remasked: Tensor | None) -> None:
    """Refuse a decoder's answers by their dtypes and shapes, which the host knows.

    Raises:
        ValueError: with what was wanted.
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
