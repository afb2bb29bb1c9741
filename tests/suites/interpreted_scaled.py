"""Norms and activations that are rounded to e4m3, and skinny products of it, in Triton's interpreter, on the CPU."""

# mypy: ignore-errors

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

from mdkern.kernels.backbone import fp8_skinny, rms_norm, swiglu, triton_fp8_skinny, triton_rms_norm, triton_swiglu
from mdkern.kernels.backbone.quantise import quantise_rows
from mdkern.kernels.backbone.scaled_linear import Scaled, scaled_linear_reference
from tests.problems.backbone import normal
from tests.suites.interpreter import mend_interpreter  # noqa: F401  a fixture, for every test here

assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"


def check_rounded(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Equal scales, and equal numbers but for those beside the middle between two of the format."""
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=0.125, atol=2**-9, equal_nan=True)
    same = got[0].view(torch.uint8) == want[0].view(torch.uint8)
    assert same.float().mean() > 0.97


@pytest.mark.parametrize(("rows", "width"), [(5, 64), (3, 100), (2, 1)])
@pytest.mark.parametrize("parts", [0, 1, 4])
def test_the_norm_is_the_references(rows: int, width: int, parts: int) -> None:
    update = normal(2, rows, 3 * width)[:, width : 2 * width] if parts < 2 else normal(2, parts, rows, width)
    outcomes = []
    for implementation in (rms_norm.scaled_rms_norm_reference, triton_rms_norm.scaled_rms_norm):
        stream = normal(1, rows, width)
        outcomes.append((stream, implementation(stream, normal(3, width), 0.1, update if parts else None)))
    (want_stream, want), (stream, got) = outcomes
    torch.testing.assert_close(stream, want_stream)
    check_rounded(got, want)


def test_the_gathered_norm_is_the_references() -> None:
    table, index = normal(3, 9, 150)[:, 1:141], torch.tensor([0, 8, 3, 3, -1, 9, 5, 2], dtype=torch.int32)
    arguments = table, index, normal(4, 140), 0.1
    want, *rounded = rms_norm.gathered_scaled_rms_norm_reference(*arguments)
    x, *got = triton_rms_norm.gathered_scaled_rms_norm(*arguments)
    torch.testing.assert_close(x, want, equal_nan=True)
    there = torch.tensor([True] * 4 + [False] * 2 + [True] * 2)
    check_rounded([part[there] for part in got], [part[there] for part in rounded])
    assert got[0][~there].float().isnan().all()


@pytest.mark.parametrize("columns", [7, 1024, 1500])
def test_swiglu_is_the_references(columns: int) -> None:
    gate, up = normal(1, 3, 2 * columns).bfloat16().chunk(2, 1)
    check_rounded(triton_swiglu.scaled_swiglu(gate, up), swiglu.scaled_swiglu_reference(gate, up))


@pytest.mark.parametrize("rows", [1, 20, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_skinny_products_are_the_references(rows: int, biased: bool) -> None:
    wide = normal(1, rows, 1024)[:, 256:768].bfloat16()
    wide[:, ::64] = 4.0  # the largest of a tile, by which it is divided exactly: no number is beside a middle
    x, weight = Scaled(*quantise_rows(wide)), Scaled(*quantise_rows(normal(2, 512, 512) / 20))
    bias = normal(5, 512).bfloat16() if biased else None
    arguments = *x, *weight, bias, torch.float32
    close = {"rtol": 1e-5, "atol": 1e-5}
    kernels = triton_fp8_skinny
    assert fp8_skinny.fits(x.values, weight.values)
    assert fp8_skinny.fits(wide, weight.values)
    torch.testing.assert_close(kernels.fp8_skinny_linear(*arguments), scaled_linear_reference(*arguments), **close)
    check_rounded(kernels.fp8_skinny_swiglu(*arguments[:-1]), fp8_skinny.fp8_skinny_swiglu_reference(*arguments[:-1]))
    for given in ((wide, None), fp8_skinny.tiled(wide)):
        want = fp8_skinny.fp8_skinny_parts_reference(*given, *weight, bias)
        torch.testing.assert_close(kernels.fp8_skinny_parts(*given, *weight, bias), want, **close)
