"""Rounding to e4m3: no number moves by more than the format's step, none leaves its range, NaN is not hidden."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone import quantise
from mdkern.kernels.backbone.quantise import (
    FP8,
    norm_level,
    quantise_columns,
    quantise_layer,
    quantise_rows,
    quantised_norm,
)
from tests.own_process import run_in_the_interpreter
from tests.problems.backbone import normal

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def check_rounding(got: Tensor, exact: Tensor, slack: float = 0.0) -> None:
    """Within half a step: 1/16 of a number down to 2^-6, 2^-10 below. `slack` is for what came before the rounding."""
    room = (exact.abs() * 2**-4).clamp(min=2**-10) + slack
    assert (got.double() - exact).abs().le(room * (1 + 1e-5)).all()


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_quantise.py")


def test_the_kernels_compile() -> None:
    from tests.suites import compiled_quantise

    compiled_quantise.main()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_rows_are_rounded_and_no_more(device: str, dtype: torch.dtype, spread: float) -> None:
    x = (normal(1, 7, 300) * 10 ** (spread * normal(2, 7, 300))).to(device, dtype)
    quantised, scale = quantise_rows(x[:, 20:])
    assert quantised.dtype == FP8
    check_rounding(quantised, x[:, 20:].double() / scale.double()[:, None])
    assert (quantised.double().abs().amax(1) == 448).all()  # the whole range is used


@pytest.mark.parametrize("device", DEVICES)
def test_columns_are_brought_into_the_range(device: str) -> None:
    x, level = normal(1, 7, 300).to(device), torch.linspace(0.1, 500, 300, device=device)
    got = quantise_columns(x.bfloat16(), level)
    exact = x.bfloat16().double() * level.double()
    assert (got.double().abs() <= 448).all()
    assert (exact.abs() > 448).any()
    check_rounding(got, exact.clamp(-448, 448))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_contains_what_lies_around_it(device: str, whole: bool) -> None:
    """Each weight moves by half a step; shift, bias and gate are not rounded."""
    weight, factor = normal(1, 6, 100).to(device), normal(2, 100).to(device)
    bias, shift, gate = (normal(seed, size).to(device) for seed, size in ((3, 6), (4, 100), (5, 6)))
    bias, shift, gate = (bias, shift, gate) if whole else (None, None, None)
    out = torch.empty(6, 100, dtype=FP8, device=device), factor.new_empty(6), factor.new_empty(6)
    quantise_layer(weight, bias, factor, shift, gate, out=out)
    x = normal(6, 20, 100).to(device).double()
    within = factor.double() * x + (0 if shift is None else shift.double())
    exact = within @ weight.double().T + (0 if bias is None else bias.double())
    exact = exact if gate is None else exact * gate.double()
    got = x @ out[0].double().T * out[1].double() + out[2].double()
    room = (x.abs() * factor.double().abs()) @ weight.double().abs().T * (1 if gate is None else gate.double().abs())
    assert ((got - exact).abs() <= room / 16 + 1e-5).all()
    assert (got - exact).abs().max() > 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_and_what_is_not_finite(device: str) -> None:
    x = normal(1, 4, 100).to(device)
    x[0], x[1, 3], x[2, 7] = 0, torch.nan, torch.inf
    quantised, scale = quantise_rows(x)
    back = quantised.float() * scale[:, None]
    assert (back[0] == 0).all()
    assert scale[0] > 0
    assert back.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [2, 100, 768, 1000])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_a_norm_never_leaves_the_range(device: str, width: int, mean: float) -> None:
    """Not even one that has a single large entry, which is the largest that there is."""
    x = mean + normal(1, 20, width)
    x[0], x[0, 1] = 0, 1e4
    got = quantised_norm(x.to(device))
    exact = (x.double() - x.double().mean(1, keepdim=True)) * (x.double().var(1, False, keepdim=True) + 1e-5).rsqrt()
    level = norm_level(width)
    assert 448 / 2 < level * math.sqrt(width) <= 448
    check_rounding(got.cpu(), exact * level, slack=level * (1 + mean) * 2**-20)  # sums in float32


def test_arguments_that_do_not_fit_are_refused() -> None:
    for x in (normal(1, 5), normal(1, 5, 5).double(), torch.ones(5, 5, dtype=torch.int64), normal(1, 5, 0)):
        with pytest.raises(ValueError, match="bfloat16"):
            quantise_rows(x)
    with pytest.raises(ValueError, match="level must be"):
        quantise_columns(normal(1, 5, 5), normal(2, 4))


def test_the_operators_are_well_registered() -> None:
    torch.library.opcheck(quantise.quantise_rows_operator, (normal(1, 3, 20),))
    torch.library.opcheck(quantise.quantise_columns_operator, (normal(1, 3, 20), normal(2, 20)))
    weight, vector = normal(3, 4, 20), normal(4, 20)
    out = torch.empty(4, 20, dtype=FP8), torch.empty(4), torch.empty(4)
    torch.library.opcheck(
        quantise.quantise_layer_operator, (*out, weight, None, vector, vector, None), test_utils="test_faketensor"
    )
    torch.library.opcheck(quantise.quantised_norm_operator, (normal(1, 3, 20),))
