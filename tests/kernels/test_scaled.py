"""Rows in e4m3 out of norms and activations, and products of them, by their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone import fp8_skinny, rms_norm, scaled_linear, swiglu
from mdkern.kernels.backbone.quantise import FP8, quantise_rows
from mdkern.kernels.backbone.scaled_linear import Scaled
from mdkern.kernels.backbone.skinny import SPLITS
from tests.own_process import run_in_the_interpreter
from tests.problems.backbone import normal

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_scaled.py")


def test_the_kernels_compile() -> None:
    from tests.suites import compiled_scaled

    compiled_scaled.main()


def check_rounded_once(got: Scaled, exact: Tensor, of_sums: float = 0.0) -> None:
    """Within half a step of e4m3, 1/16 of a number or 2^-10 of the scale, and the largest of each row as 448.

    `of_sums`: the error of what was rounded, by the largest number of its row.
    """
    room = (exact.abs() / 16).clamp(min=got.scales.double()[:, None] * 2**-10)
    room += of_sums * exact.abs().amax(1, keepdim=True)
    assert got.values.dtype == FP8
    assert ((got.values.double() * got.scales.double()[:, None] - exact).abs() <= room * (1 + 1e-4)).all()
    assert (got.values.double().abs().amax(1) == 448).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (33, 4096), (3, 100)])
def test_norms_are_rounded_once(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    x, update, weight = (normal(seed, rows, width).to(device, dtype) for seed in (1, 2, 3))
    added, weight = (x.double() + update.double()).to(dtype), weight[0]
    exact = added.double() / (added.double().square().mean(1, keepdim=True) + 0.5).sqrt() * weight.double()
    stream = x.clone()
    normed = rms_norm.scaled_rms_norm(stream, weight, 0.5, update=update)
    assert torch.equal(stream, added)
    check_rounded_once(normed, exact)
    stream, parts = x.clone(), torch.stack((update.float() - 1.0, torch.ones_like(update, dtype=torch.float32)))
    check_rounded_once(rms_norm.scaled_rms_norm(stream, weight, 0.5, update=parts), normed_of(stream, weight))
    torch.testing.assert_close(stream, added, rtol=1e-2, atol=1e-6)
    index = torch.tensor([rows - 1, 0, 0], device=device)
    some, normed = rms_norm.gathered_scaled_rms_norm(added, index, weight, 0.5)
    assert torch.equal(some, added[index])
    check_rounded_once(normed, exact[index])


def normed_of(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(1, keepdim=True) + 0.5).sqrt() * weight.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [7, 1000, 18944])
def test_the_activation_is_rounded_once(device: str, width: int) -> None:
    gate, up = normal(1, 3, 2 * width).to(device, torch.bfloat16).chunk(2, 1)
    exact = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    check_rounded_once(swiglu.scaled_swiglu(gate, up), exact)


def scaled(seed: int, rows: int, width: int, device: str) -> Scaled:
    """Rows of very different size."""
    sizes = 10 ** normal(seed + 100, rows, 1)
    return Scaled(*quantise_rows((normal(seed, rows, width) * sizes).to(device)))


def exact_product(x: Tensor, weight: Scaled, bias: Tensor | None) -> Tensor:
    product = x.double() @ weight_of(weight).T
    return product if bias is None else product + bias.double()


def weight_of(weight: Scaled) -> Tensor:
    return weight.values.double() * weight.scales.double()[:, None]


def check_products(got: Tensor, exact: Tensor, x: Tensor, weight: Scaled, bound: float) -> None:
    """Errors of a sum are measured by the sum of its terms' sizes."""
    sizes = x.double().abs() @ weight_of(weight).abs().T
    assert ((got.double() - exact).abs() <= bound * sizes + exact.abs() * torch.finfo(got.dtype).eps).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 17, 64, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_numbers_given(device: str, rows: int, biased: bool) -> None:
    """Hopper sums products of e4m3 with some 13 bits."""
    x, weight = scaled(1, rows, 1024, device), scaled(2, 512, 1024, device)
    bias = normal(3, 512).to(device, torch.bfloat16) if biased else None
    dtype, bound = (torch.float32, 1e-6) if device == "cpu" else (torch.bfloat16, 2**-12)
    wide = weight_of(x)
    exact = exact_product(wide, weight, bias)
    got = scaled_linear.scaled_linear(x, weight, bias, dtype=dtype)
    assert got.dtype == dtype
    check_products(got, exact, wide, weight, bound)
    if rows > 64:
        return
    assert fp8_skinny.runs_fp8_skinny(x.values, weight.values) == (device == "cuda")
    check_products(fp8_skinny.fp8_skinny_linear(x, weight, bias, dtype=dtype), exact, wide, weight, bound)
    gate, up = exact.chunk(2, 1)
    want = gate / (1 + (-gate).exp()) * up
    activated = fp8_skinny.fp8_skinny_swiglu(x, weight, bias)
    tiles = want.view(-1, fp8_skinny.TILE)
    rounded = Scaled(activated.values.view(tiles.shape), activated.scales.flatten())
    check_rounded_once(rounded, tiles, 1e-5 if device == "cpu" else 2**-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_parts_round_each_tile_of_a_row(device: str, rows: int, biased: bool) -> None:
    """A tile of large numbers leaves the precision of those beside it as it is."""
    tiles = 10 ** normal(7, rows, 1024 // fp8_skinny.TILE, 1)
    x = (normal(1, rows, 1024).unflatten(1, (*tiles.shape[1:2], -1)) * tiles).flatten(1).to(device, torch.bfloat16)
    rounded = Scaled(*quantise_rows(x.view(-1, fp8_skinny.TILE)))
    rounded_x = weight_of(rounded).view(x.shape)
    given = fp8_skinny.Tiled(rounded.values.view(x.shape), rounded.scales.view(rows, -1))
    step = x.double().view(-1, fp8_skinny.TILE).abs().amax(1).repeat_interleave(fp8_skinny.TILE).view(x.shape) / 448
    assert ((rounded_x - x.double()).abs() <= torch.maximum(x.double().abs() / 15, 2**-9 * step)).all()
    weight, bias = scaled(2, 512, 1024, device), normal(3, 512).to(device, torch.bfloat16) if biased else None
    sizes = x.double().abs() @ weight_of(weight).abs().T
    exact = exact_product(rounded_x, weight, bias)
    for operand in (x, given):
        parts = fp8_skinny.fp8_skinny_parts(operand, weight, bias)
        assert parts.shape == (SPLITS, rows, 512)
        assert parts.dtype == torch.float32
        ties = 0.0 if device == "cpu" else 2**-9  # numbers that are rounded the other way, and the sums of e4m3
        assert ((parts.double().sum(0) - exact).abs() <= (ties + 1e-6) * sizes).all()
        spans = zip(rounded_x.chunk(SPLITS, 1), weight_of(weight).chunk(SPLITS, 1), parts.double(), strict=True)
        for number, (some, columns, part) in enumerate(spans):
            want = some @ columns.T + (bias.double() if bias is not None and not number else 0.0)
            assert ((part - want).abs() <= (ties + 1e-6) * sizes).all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = scaled(1, 3, 64, "cpu"), scaled(2, 32, 64, "cpu")
    product = scaled_linear.scaled_linear
    for match, arguments in (
        ("x must be torch.float8_e4m3fn", (Scaled(x.values.float(), x.scales), weight, None)),
        ("scales of x", (Scaled(x.values, x.scales[:2]), weight, None)),
        ("scales of the weight", (x, Scaled(weight.values, weight.scales.double()), None)),
        ("weight must be", (x, scaled(2, 32, 48, "cpu"), None)),
        ("16 must divide its sides, not", (x, scaled(2, 24, 64, "cpu"), None)),
        ("must be contiguous", (x, Scaled(scaled(2, 32, 128, "cpu").values[:, :64], weight.scales), None)),
        ("bias must be", (x, weight, normal(1, 31))),
    ):
        with pytest.raises(ValueError, match=match):
            product(*arguments, dtype=torch.float32)
        with pytest.raises(ValueError, match=match):
            fp8_skinny.fp8_skinny_swiglu(*arguments)
    with pytest.raises(ValueError, match="32 columns cannot be divided"):
        fp8_skinny.fp8_skinny_swiglu(x, weight)
    with pytest.raises(ValueError, match="64 numbers cannot be divided"):
        fp8_skinny.fp8_skinny_parts(normal(1, 3, 64), weight)
    long = scaled(1, 16, 512, "cpu")
    with pytest.raises(ValueError, match="scales of x"):
        fp8_skinny.fp8_skinny_parts(fp8_skinny.Tiled(*long), long)
    with pytest.raises(ValueError, match="update"):
        rms_norm.scaled_rms_norm(normal(1, 3, 8), normal(2, 8), 0.1, update=normal(3, 2, 8))
    with pytest.raises(ValueError, match="up"):
        swiglu.scaled_swiglu(normal(1, 3, 8), normal(2, 3, 7))


WITHOUT_ARITHMETIC = ("test_autograd_registration", "test_faketensor")  # of which PyTorch has none in e4m3


def test_the_operators_are_well_registered() -> None:
    x, weight, index = normal(1, 6, 32), normal(2, 32), torch.tensor([3, 1, 1])
    check = torch.library.opcheck
    check(rms_norm.scaled_rms_norm_operator, (x, weight, 0.1, x.clone()))
    check(rms_norm.gathered_scaled_rms_norm_operator, (x, index, weight, 0.1))
    check(swiglu.scaled_swiglu_operator, (x, x.clone()))
    operands = *scaled(1, 3, 512, "cpu"), *scaled(2, 32, 512, "cpu"), normal(3, 32), torch.float32
    for operator in (scaled_linear.scaled_linear_operator, fp8_skinny.fp8_skinny_linear_operator):
        check(operator, operands, test_utils=WITHOUT_ARITHMETIC)
    gated = *scaled(1, 3, 64, "cpu"), *scaled(2, 256, 64, "cpu"), normal(3, 256)
    check(fp8_skinny.fp8_skinny_swiglu_operator, gated, test_utils=WITHOUT_ARITHMETIC)
    parts = fp8_skinny.fp8_skinny_parts_operator
    for x_and_scales in ((normal(1, 3, 512), None), fp8_skinny.tiled(normal(1, 3, 512))):
        check(parts, (*x_and_scales, *operands[2:5]), test_utils=WITHOUT_ARITHMETIC)
