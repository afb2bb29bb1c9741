"""Products of about a thousand rows: where they run, and that they are as exact as PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone import linear
from mdkern.kernels.backbone.folded_norm import row_sums
from mdkern.kernels.backbone.linear import linear_gelu, linear_residual, linear_rotary
from mdkern.kernels.invariant import batch_invariant
from tests.own_process import run_in_the_interpreter
from tests.problems.backbone import normal


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_linear.py")


def test_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_hopper", lambda _: True)

    def serves(rows: int, columns: int = 768, inner: int = 768, dtype: torch.dtype = torch.bfloat16) -> bool:
        x, weight = torch.empty(rows, inner, dtype=dtype), torch.empty(columns, inner, dtype=dtype)
        assert not (linear.runs_in_the_middle(x, weight) and linear.runs_fused(x, weight))
        return linear.runs_in_the_middle(x, weight)

    rows = 255, 256, 511, 512, 1280, 1281, 4096, 4097
    assert [serves(number) for number in rows] == [False, False, False, True, True, False, False, False]
    for narrow in ({"inner": 192}, {"columns": 192}):
        assert [serves(number, **narrow) for number in rows] == [False, True, True, True, True, True, True, False]
    assert not serves(1024, columns=700)
    assert not serves(1024, inner=700)
    assert not serves(1024, dtype=torch.float32)
    with batch_invariant():
        assert not serves(1024)
    monkeypatch.setattr(linear, "is_hopper", lambda _: False)
    assert not serves(1024)


def test_it_stands_in_for_the_hopper_kernels_in_the_batch_invariant_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_hopper", lambda _: True)
    weight = torch.empty(512, 256, dtype=torch.bfloat16)

    def runs(rows: int, summed: bool, most: int = linear.MOST_ALIKE_ROWS) -> str:
        x = torch.empty(rows, 256, dtype=torch.bfloat16)
        kernels = linear.launcher(x, weight, linear.sums_of_stream(x) if summed else None, 256, most)
        return "none" if kernels is None else kernels.__name__.rsplit(".", 1)[1]

    for summed in (False, True):
        with batch_invariant():
            assert [runs(rows, summed) for rows in (1, 1024, 2048)] == ["triton_linear"] * 3
            assert [runs(rows, summed) for rows in (2049, 5000)] == ["launch_linear"] * 2
            assert [runs(rows, summed, 1280) for rows in (1280, 1281)] == ["triton_linear", "launch_linear"]
        assert [runs(rows, summed) for rows in (1, 2049, 5000)] == ["none", "none", "launch_linear"]


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [512, 1024, 1111])
def test_gpu_products_are_as_exact_as_pytorchs(dtype: torch.dtype, rows: int) -> None:
    """Against float64; the norm of the rows is divided out of the product in place of beforehand."""
    x = (normal(1, rows, 768) + 0.5).to("cuda", dtype)
    weight = normal(2, 2304, 768) * 768**-0.5
    weight = (weight - weight.mean(1, keepdim=True)).to("cuda", dtype)
    bias = normal(3, 2304, dtype=dtype, device="cuda")
    angle = normal(4, 500, 32).cuda()
    cos, sin = angle.cos(), angle.sin()
    normed = F.layer_norm(x.double(), (768,))
    sums = row_sums(x, linear.span_of_sums(rows, 768))
    for spans, rows_of_product in ((None, x.double()), (sums, normed)):
        exact = F.linear(rows_of_product, weight.double(), bias.double())
        plain = F.linear(rows_of_product.to(dtype), weight, bias)
        got = linear_gelu(x, weight, bias, sums=spans)
        bound = 1.4 * relative_error(F.gelu(plain, approximate="tanh"), F.gelu(exact, approximate="tanh"))
        assert relative_error(got, F.gelu(exact, approximate="tanh")) < bound
        got = linear_rotary(x, weight, cos, sin, heads=24, length=500, bias=bias, sums=spans)
        bound = 1.4 * relative_error(plain, exact)
        linear.rotary(exact.view(rows, 36, 64)[:, :24], cos.double(), sin.double(), length=500)
        assert relative_error(got, exact) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sequences", [0, 2])
@pytest.mark.parametrize("inner", [768, 3072])
def test_gpu_residual_updates_are_as_exact_as_pytorchs(dtype: torch.dtype, sequences: int, inner: int) -> None:
    x, stream = normal(1, 1100, inner).to("cuda", dtype), normal(2, 1100, 768).to("cuda", dtype)
    weight, bias = (normal(3, 768, inner) * inner**-0.5).to("cuda", dtype), normal(4, 768).to("cuda", dtype)
    gate = normal(5, *((sequences,) if sequences else ()), 768).to("cuda", dtype)
    gates = gate.double().repeat_interleave(550, 0) if sequences else gate.double()
    exact = stream.double() + gates * F.linear(x.double(), weight.double(), bias.double())
    plain = (stream.double() + gates * F.linear(x, weight, bias).double()).to(dtype)
    sums = linear.sums_of_stream(stream)
    linear_residual(stream, x, weight, bias, gate, sums=sums)
    assert relative_error(stream, exact) < 1.2 * relative_error(plain, exact)
    if linear.runs_in_the_middle(x, weight):
        torch.testing.assert_close(sums.double(), row_sums(exact, linear.span_of_sums(1100, 768)), rtol=1e-3, atol=0.05)
