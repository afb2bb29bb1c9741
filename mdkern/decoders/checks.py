"""Refusing parameters that cannot be right."""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from numbers import Real
from typing import Any


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
