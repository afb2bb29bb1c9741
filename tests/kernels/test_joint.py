"""The kernel of `joint` for more than a few rows: as plain Python on the CPU, and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from mdkern.kernels.backbone import hopper_joint, joint, launch_joint
from mdkern.kernels.backbone.joint_tiles import TILINGS, Tiling, choose_tiling, pays
from tests.problems.backbone import normal
from tests.problems.gluon_on_cpu import OnCpu

SMALL = [Tiling(2, 256), Tiling(3, 128), Tiling(1, 128)]
Layer = tuple[Tensor, Tensor | None]


def small_integers(seed: int, *shape: int) -> Tensor:
    """Sums of 40 products of these are exact in bfloat16."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_joint, "joint_kernel", OnCpu(hopper_joint.joint_kernel))
    monkeypatch.setattr(launch_joint, "stages_of", lambda *_: 2)
    monkeypatch.setattr(launch_joint, "INNER", 16)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tiling", SMALL)
@pytest.mark.parametrize("widths", [(64,), (192, 64), (320, 64, 128)])
def test_products_of_several_weights(tiling: Tiling, widths: tuple[int, ...]) -> None:
    """Tiles lie across the borders between weights, more of them than programs, and past the ends of all sizes."""
    x = small_integers(0, 300, 40)
    weights = [small_integers(1 + n, width, 40) for n, width in enumerate(widths)]
    biases = [None if n == 1 else small_integers(10 + n, width, 2)[:, 1] for n, width in enumerate(widths)]
    out = torch.full((300, sum(widths)), torch.nan, dtype=x.dtype)
    launch_joint.launch(x, weights, biases, out, False, tiling)
    assert torch.equal(out, torch.cat([F.linear(x, *layer) for layer in zip(weights, biases)], 1))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tiling", SMALL)
@pytest.mark.parametrize("places", [(104, 600), (600, 104)])
def test_gate_and_up_wherever_they_are(tiling: Tiling, places: tuple[int, int]) -> None:
    x, memory, bias = small_integers(0, 300, 40), small_integers(1, 1000, 40), small_integers(2, 160, 2)[:, 1]
    gate, up = (memory[place : place + 160] for place in places)
    out = torch.full((300, 160), torch.nan, dtype=x.dtype)
    launch_joint.launch(x, [gate, up], [None, bias], out, True, tiling)
    want = F.silu(F.linear(x.float(), gate.float())) * F.linear(x.float(), up.float(), bias.float())
    torch.testing.assert_close(out.float(), want, rtol=2**-8, atol=0.0)


def test_what_tma_cannot_copy_runs_by_other_kernels() -> None:
    """The hardware copies rows at multiples of 16 bytes; a pair is read as one tensor by the distance of the two."""
    x, memory = small_integers(0, 300, 40), small_integers(1, 40 * 129)
    whole, shifted = (memory[first : first + 40 * 128].view(128, 40) for first in (0, 4))
    assert joint.fits(x, whole, whole)
    odd, turned = memory[: 41 * 64].view(64, 41), memory[: 40 * 64].view(40, 64).T
    apart = memory[: 80 * 64].view(64, 80)[:, :40]
    for weight in (shifted, odd, turned, apart, whole[:60]):
        assert not joint.fits(x, whole, weight)
    assert not joint.fits(x[:, 1:33], whole[:, :32].contiguous())
    assert not joint.fits(x.float(), whole.float())
    assert joint.is_near(whole[:64], whole[64:])  # halves of one tensor
    assert not joint.is_near(whole, whole)


def test_tiles_fill_the_multiprocessors() -> None:
    """Tiles of LLaDA-8B's and of Qwen3-4B's products, and how often 132 programs go round."""
    for rows, columns, want in (
        (256, 3 * 4096, (3, 128)),  # 128 tiles, once
        (128, 3 * 4096, (2, 128)),  # 96, once; in threes half of the programs would be idle
        (256, 4096 + 2 * 1024, (2, 128)),
        (128, 4096 + 2 * 1024, (1, 128)),
        (256, 2 * 12288, (3, 128)),  # 256, twice
        (2048, 2 * 12288, (2, 256)),  # 1,536, twelve times; smaller ones would be less idle at the end, but read more
    ):
        assert choose_tiling(rows, columns, 132)[:2] == want


def test_products_that_leave_programs_idle_do_not_pay() -> None:
    assert pays(512, 3 * 4096, 132, gated=False)  # 256 tiles: all programs twice but eight
    assert not pays(320, 3 * 4096, 132, gated=False)  # 2.5 rows of tiles, of which 192 take two rounds
    assert pays(320, 2 * 12288, 132, gated=True)  # as many tiles twice, in three rounds
    assert pays(65, 128, 132, gated=False)  # one round, which costs as much as one launch


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def exact(x: Tensor, layer: Layer) -> Tensor:
    return F.linear(x.double(), layer[0].double(), None if layer[1] is None else layer[1].double())


def layer_of(seed: int, columns: int, inner: int, dtype: torch.dtype, biased: bool) -> Layer:
    weight = normal(seed, columns, inner, device="cuda") * inner**-0.5
    return weight.to(dtype), normal(seed + 1, columns, dtype=dtype, device="cuda") if biased else None


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(("dtype", "biased"), [(torch.bfloat16, True), (torch.float16, False)])
def test_gpu_products_by_all_tiles(tiling: Tiling, dtype: torch.dtype, biased: bool) -> None:
    """X as columns of a wider matrix, sizes that no tile divides, and, of the smallest tiles, several for a program."""
    x = normal(1, 1030, 400, dtype=dtype, device="cuda")[:, 200:]
    layers = [layer_of(2 + 2 * place, columns, 200, dtype, biased) for place, columns in enumerate((1088, 64, 128))]
    out = x.new_empty(1030, 1280)
    launch_joint.launch(x, [weight for weight, _ in layers], [bias for _, bias in layers], out, False, tiling)
    want = torch.cat([exact(x, layer) for layer in layers], 1)
    plain = torch.cat([F.linear(x, *layer) for layer in layers], 1)
    assert relative_error(out, want) <= 1.01 * relative_error(plain, want)
    pair = layers[0], layer_of(20, 1088, 200, dtype, biased)
    for gate, up in (pair, pair[::-1]):
        want = F.silu(exact(x, gate)) * exact(x, up)
        out = x.new_empty(1030, 1088)
        launch_joint.launch(x, [gate[0], up[0]], [gate[1], up[1]], out, True, tiling)
        assert relative_error(out, want) <= 1.05 * relative_error(want.to(dtype), want)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [65, 256, 1100])
@pytest.mark.parametrize(("inner", "widths", "hidden"), [(3584, (3584, 512, 512), 18944), (1024, (512, 512), 1024)])
def test_gpu_products_are_as_exact_as_pytorchs(rows: int, inner: int, widths: tuple[int, ...], hidden: int) -> None:
    x = normal(1, rows, inner, dtype=torch.bfloat16, device="cuda")
    layers = [layer_of(2 + 2 * place, columns, inner, x.dtype, True) for place, columns in enumerate(widths)]
    assert joint.fits(x, *(weight for weight, _ in layers))
    for got, one in zip(joint.joint_linear(x, *layers), layers, strict=True):
        want = exact(x, one)
        assert relative_error(got, want) <= 1.01 * relative_error(F.linear(x, *one), want)
    gate, up = (layer_of(seed, hidden, inner, x.dtype, True) for seed in (20, 22))
    assert joint.runs_joint_swiglu(x, gate[0], up[0]) or (rows, hidden) == (65, 18944)  # half of the rows are padding
    want = F.silu(exact(x, gate)) * exact(x, up)
    assert relative_error(joint.joint_swiglu(x, gate, up), want) <= 1.05 * relative_error(want.to(x.dtype), want)
