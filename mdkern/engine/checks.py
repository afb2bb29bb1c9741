"""Checks of the numbers, flags and tensors that callers give."""

from __future__ import annotations

from math import inf, nan
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdkern.engine.request import Filters

MOST_COUNT = 2**31 - 1
MOST_FLOAT32 = float(np.finfo(np.float32).max)


def check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if int(value) > MOST_COUNT:
        raise ValueError(f"{name} must be at most {MOST_COUNT}, not {value!r}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def check_real(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float, if it is a real number from `low` to `high`; NumPy's numbers and fractions are, too."""
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else nan
    if not low <= number < inf:
        raise ValueError(f"{name} must be a finite number of at least {low:g}, not {value!r}")
    if number > high:
        raise ValueError(f"{name} must be at most {high:g}, not {value!r}")
    return float(number)


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, not one of {tensor.layout}: call to_dense() first")


def check_filters(top_k: Any, top_p: Any, min_p: Any, top_p_rule: str) -> Filters:
    """The `Filters` of these arguments. None leaves a filter out."""
    has_nucleus = top_p is not None
    top_k = 0 if top_k is None else top_k
    top_p = 1.0 if top_p is None else top_p
    min_p = 0.0 if min_p is None else min_p
    if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 0:
        raise ValueError(f"top_k must be a whole number of at least 0, not {top_k!r}")
    if isinstance(top_p, bool) or not isinstance(top_p, Real) or not 0 < float(top_p) <= 1:
        raise ValueError(f"top_p must be a number above 0 and at most 1, not {top_p!r}")
    if isinstance(min_p, bool) or not isinstance(min_p, Real) or not 0 <= float(min_p) <= 1:
        raise ValueError(f"min_p must be a number from 0 to 1, not {min_p!r}")
    filters = Filters(min(int(top_k), MOST_COUNT), float(top_p), float(min_p), top_p_rule)
    filters.check()
    if top_p_rule != "reach" and not has_nucleus:
        raise ValueError(f"top_p_rule={top_p_rule!r} says how top_p is meant: give a top_p, or leave the rule out")
    return filters


def refuse_class(name: str, value: Any) -> None:
    """Refuse a class where an object of it is wanted."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be made first: {value.__name__} is a class, give {value.__name__}(...)")
