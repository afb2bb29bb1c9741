"""Products of matrices in e4m3: each term is exact, so that only sums in float32 separate them from float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone import linear_fp8
from mdkern.kernels.backbone.linear_fp8 import scaled_gelu, scaled_residual, scaled_rotary
from mdkern.kernels.backbone.quantise import FP8, quantise_rows
from mdkern.kernels.backbone.rotary import rotary
from mdkern.kernels.invariant import batch_invariant
from tests.problems.backbone import normal

# Rows, columns, depth: one that no Hopper kernel takes, two for the one whose rows stay in shared memory, and one for
# the one whose rows do not fit there. The last tiles of rows are not whole.
SHAPES = [
    ("cpu", 12, 64, 48),
    *(
        pytest.param("cuda", *shape, marks=pytest.mark.gpu)
        for shape in ((12, 64, 48), (4096, 768, 256), (6003, 2304, 768), (6003, 512, 3072))
    ),
]


def layer(rows: int, columns: int, depth: int, device: str) -> tuple[list[Tensor], Tensor]:
    """x, weight, scale and bias, and ``(x @ weight.T) * scale + bias`` in float64."""
    x, _ = quantise_rows(normal(1, rows, depth).to(device))
    weight, scale = quantise_rows(normal(2, columns, depth).to(device))
    scale, bias = scale * depth**-0.5 / 100, normal(3, columns, device=device)
    exact = F.linear(x.double(), weight.double()) * scale.double() + bias.double()
    return [x, weight, scale, bias], exact


def room(device: str, depth: int, dtype: torch.dtype) -> dict[str, float]:
    """Of a sum of `depth` products, of size 1 or so, that is rounded to `dtype` at the end.

    Hopper's tensor cores cut off sums of 32 products in e4m3 behind the 13th bit, always towards zero.
    """
    if device == "cpu":
        return {"rtol": 1e-5, "atol": 2e-5}
    return {"rtol": torch.finfo(dtype).eps / 2 + depth / 32 * 2**-13, "atol": 2 * depth**0.5 * 2**-13}


@pytest.mark.parametrize(("device", "rows", "columns", "depth"), SHAPES)
@pytest.mark.parametrize("pairs", [16, 32])
def test_rotary(device: str, rows: int, columns: int, depth: int, pairs: int) -> None:
    operands, exact = layer(rows, columns, depth, device)
    angle = normal(4, 6, pairs).to(device)
    heads = columns // (2 * pairs) - 1
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    got = scaled_rotary(*operands, angle.cos(), angle.sin(), heads=heads, length=6, dtype=dtype)
    rotary(exact.view(rows, -1, 2 * pairs)[:, :heads], angle.cos().double(), angle.sin().double(), length=6)
    assert got.dtype == dtype
    allowed, pair = room(device, depth, dtype), exact.view(rows, -1, 2, pairs).norm(dim=2, keepdim=True)
    most = (
        2 * allowed["rtol"] * pair + allowed["atol"]
    )  # two numbers that are turned into each other share their errors
    assert ((got.double() - exact).view(rows, -1, 2, pairs).abs() <= most).all()


@pytest.mark.parametrize(("device", "rows", "columns", "depth"), SHAPES)
def test_gelu(device: str, rows: int, columns: int, depth: int) -> None:
    """Rounded to e4m3, which is 1/16 of a number at most. Columns have levels of their own, and saturate."""
    operands, exact = layer(rows, columns, depth, device)
    level = torch.linspace(1, 200, columns, device=device)
    got = scaled_gelu(*operands, level)
    assert got.dtype == FP8
    want = (F.gelu(exact, approximate="tanh") * level).clamp(max=448)
    assert want.max() == 448
    sums = room(device, depth, torch.float32)
    tangent = 0 if device == "cpu" else 2**-10  # its approximation in the kernel
    absolute = 2**-10 + (sums["atol"] + tangent) * float(level.max())
    torch.testing.assert_close(got.double(), want, rtol=2**-4 + 2 * sums["rtol"], atol=absolute)


@pytest.mark.parametrize(("device", "rows", "columns", "depth"), SHAPES)
def test_residual(device: str, rows: int, columns: int, depth: int) -> None:
    operands, exact = layer(rows, columns, depth, device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    stream = normal(5, rows, columns).to(device, dtype)
    want = stream.double() + exact
    scaled_residual(stream, *operands)
    sums = room(device, depth, dtype)
    sums["atol"] += sums["rtol"] * float(exact.abs().max())  # the sum with the stream may be smaller than its parts
    torch.testing.assert_close(stream.double(), want, **sums)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4096, 16_384, 100_001])
def test_gpu_products_are_the_same_wherever_rows_lie(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In shared memory for all columns, or copied for each tile: the sums have the same order."""
    from mdkern.kernels.backbone import launch_linear

    operands, _ = layer(rows, 768, 768, "cuda")
    if not linear_fp8.runs_fused(*operands[:2]):
        pytest.skip("for Hopper")
    level = torch.ones(768, device="cuda")
    resident = scaled_gelu(*operands, level)
    monkeypatch.setattr(launch_linear, "stays_resident", lambda x: False)
    assert torch.equal(resident.view(torch.uint8), scaled_gelu(*operands, level).view(torch.uint8))


@pytest.mark.gpu
def test_gpu_products_do_not_depend_on_other_rows() -> None:
    (x, *rest), _ = layer(6003, 768, 768, "cuda")
    level = torch.ones(768, device="cuda")
    with batch_invariant():
        whole = scaled_gelu(x, *rest, level)
        for rows in (1, 100, 5000):
            assert torch.equal(scaled_gelu(x[:rows], *rest, level).view(torch.uint8), whole[:rows].view(torch.uint8))


def test_what_does_not_fit_is_refused() -> None:
    (x, weight, scale, bias), _ = layer(6, 64, 48, "cpu")
    with pytest.raises(ValueError, match="x must be"):
        scaled_gelu(x.float(), weight, scale, bias, bias)
    with pytest.raises(ValueError, match="weight must be"):
        scaled_gelu(x, weight[:, 1:], scale, bias, bias)
    with pytest.raises(ValueError, match="scale must be"):
        scaled_gelu(x, weight, scale.double(), bias, bias)
    with pytest.raises(ValueError, match="level must be"):
        scaled_gelu(x, weight, scale, bias, bias[1:])
    with pytest.raises(ValueError, match="stream must be"):
        scaled_residual(normal(5, 6, 63), x, weight, scale, bias)


def test_the_operators_are_well_registered() -> None:
    (x, weight, scale, bias), _ = layer(6, 64, 48, "cpu")
    angle = normal(4, 6, 16)
    operands = x, weight, scale, bias
    for operator, arguments in (
        (linear_fp8.scaled_rotary_operator, (*operands, angle.cos(), angle.sin(), 1, 6, torch.bfloat16)),
        (linear_fp8.scaled_gelu_operator, (*operands, bias.abs())),
        (linear_fp8.scaled_residual_operator, (normal(5, 6, 64), *operands)),
    ):  # PyTorch's test of the schema compares by a multiplication that e4m3 does not have
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
