"""Rounding to e4m3 in Triton's interpreter, on the CPU: run by the tests in a process of its own."""

# mypy: ignore-errors

from __future__ import annotations

import pytest
import torch
import triton

from mdkern.kernels.backbone import triton_quantise
from mdkern.kernels.backbone.quantise import (
    quantise_columns_reference,
    quantise_layer_reference,
    quantise_rows_reference,
    quantised_norm_reference,
)
from tests.problems.backbone import normal
from tests.suites.interpreter import mend_interpreter  # noqa: F401  a fixture, for every test here

assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (3, 100), (2, 5000), (1, 1), (0, 8)])
def test_rows_are_the_references(rows: int, width: int, dtype: torch.dtype) -> None:
    x = (normal(1, rows, 2 * width) * 10 ** normal(2, rows, 1)).to(dtype)[:, width:]
    if x.numel():
        x[-1] = 0
    quantised, scale = triton_quantise.quantise_rows(x)
    want, want_scale = quantise_rows_reference(x)
    assert torch.equal(quantised.float(), want.float())
    assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_is_the_references(whole: bool) -> None:
    weight, factor = normal(1, 6, 200)[:, 100:].bfloat16(), normal(2, 100)
    bias, shift, gate = (normal(3, 6), normal(4, 100).bfloat16(), normal(5, 6)) if whole else (None, None, None)
    weight[2] = 0
    outcomes = []
    for implementation in (triton_quantise.quantise_layer, quantise_layer_reference):
        out = torch.empty(6, 100, dtype=torch.float8_e4m3fn), torch.empty(6), torch.empty(6)
        implementation(*out, weight, bias, factor, shift, gate)
        outcomes.append(out)
    for got, want in zip(*outcomes):
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_is_not_hidden() -> None:
    x = normal(1, 4, 100)
    x[1, 3], x[2, 99] = torch.nan, torch.inf
    for quantised, scale in (triton_quantise.quantise_rows(x), quantise_rows_reference(x)):
        assert quantised.float().isfinite().all(1).tolist() == [True, False, False, True]
        assert (quantised.float() * scale[:, None]).isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize(("rows", "width"), [(5, 64), (3, 1100), (0, 8)])
def test_columns_are_the_references(rows: int, width: int) -> None:
    x, level = normal(1, rows, 2 * width)[:, width:], torch.linspace(1, 1000, width)
    got, want = triton_quantise.quantise_columns(x, level), quantise_columns_reference(x, level)
    assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("rows_of_program", [1, 4])
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (3, 100), (1, 768)])
def test_the_norm_is_the_references(rows: int, width: int, rows_of_program: int) -> None:
    x = 5 + normal(1, rows, 2 * width)[:, width:]
    x[0, 0] = torch.nan
    got = triton_quantise.quantised_norm(x, rows_of_program).float()
    # A number beside the middle between two of the format may go either way.
    torch.testing.assert_close(got, quantised_norm_reference(x).float(), rtol=0.125, atol=2**-9, equal_nan=True)
    assert (got == quantised_norm_reference(x).float())[1:].float().mean() > 0.99 or rows == 1
    assert got[0].isnan().all()
