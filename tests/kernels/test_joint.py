"""The kernel of `joint` for more than a few rows: as plain Python on the CPU, and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from mdkern.kernels.backbone import hopper_joint, joint, launch_joint
from mdkern.kernels.backbone.joint_tiles import IN_PARTS, TILINGS, Tiling, choose_tiling, pays
from mdkern.kernels.backbone.rms_norm import rms_norm, rms_norm_reference
from mdkern.kernels.invariant import batch_invariant
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


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tiling", SMALL)
@pytest.mark.parametrize(("rows", "width", "depth"), [(300, 320, 72), (33, 64, 16)])
def test_an_early_launch_reads_the_rows_when_they_are_there(
    tiling: Tiling, rows: int, width: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More steps than the ring has places, or fewer; more tiles than programs, or fewer."""
    given, weight = small_integers(0, rows, depth), small_integers(1, width, depth)
    x = torch.full_like(given, torch.nan)
    kernel = OnCpu(hopper_joint.joint_kernel, earlier=lambda: x.copy_(given))
    monkeypatch.setattr(launch_joint, "joint_kernel", kernel)
    monkeypatch.setattr(launch_joint, "runs_early", lambda *_: True)
    out = torch.full((rows, width), torch.nan, dtype=x.dtype)
    launch_joint.launch(x, [weight], [None], out, False, tiling)
    assert torch.equal(out, F.linear(given, weight))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("rows", [33, 256, 300])
@pytest.mark.parametrize(("width", "depth", "biased"), [(192, 64, True), (128, 192, False), (320, 64, True)])
def test_parts_of_a_product(rows: int, width: int, depth: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that come late; parts of one step or of more steps than the ring has places; more tiles than programs."""
    given, weight = small_integers(0, rows, depth), small_integers(1, width, depth)
    bias = small_integers(2, 1, width)[0] if biased else None
    x = torch.full_like(given, torch.nan)
    kernel = OnCpu(hopper_joint.joint_kernel, earlier=lambda: x.copy_(given))
    monkeypatch.setattr(launch_joint, "joint_kernel", kernel)
    out = torch.full((4 * joint.whole_tiles(x), width), torch.nan, dtype=x.dtype)
    launch_joint.launch(x, [weight], [bias], out, False, IN_PARTS, 4)
    got = out.view(4, -1, width)[:, :rows]
    for part, columns in enumerate(torch.arange(depth).chunk(4)):
        want = F.linear(given[:, columns], weight[:, columns], bias if part == 0 else None)
        assert torch.equal(got[part], want)


def test_parts_that_are_rounded_add_up_as_exactly_as_a_rounded_product() -> None:
    x, (weight, bias) = normal(1, 200, 1024).bfloat16(), (normal(2, 256, 1024) / 32, normal(3, 256))
    layer = weight.bfloat16(), bias.bfloat16()
    want, parts = exact(x, layer), joint.joint_parts(x, *layer)
    assert (parts.shape, parts.dtype) == ((4, 200, 256), torch.bfloat16)
    assert relative_error(parts.double().sum(0), want) <= 1.05 * relative_error(want.bfloat16(), want)
    stream = normal(4, 200, 256).bfloat16()
    got, plain = stream.clone(), stream.clone()
    rms_norm(got, torch.ones(256), 1e-5, update=parts)
    rms_norm(plain, torch.ones(256), 1e-5, update=F.linear(x, *layer))
    want += stream.double()
    assert relative_error(got, want) <= 1.05 * relative_error(plain, want)


def test_where_passes_are_launched_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaDA's 8B on 132 multiprocessors; 3,584 columns would leave some idle, and 5,120 take two rounds."""
    monkeypatch.setattr(joint, "is_hopper", lambda _: True)
    monkeypatch.setattr(joint, "num_sms", lambda _: 132)
    device = torch.device("cuda", 0)
    for rows, width, want in ((256, 4096, True), (129, 4096, True), (128, 4096, False), (257, 4096, False)):
        assert joint.runs_early(rows, width, device) == want
    for width in (768, 2048, 3584, 5120):
        assert not joint.runs_early(256, width, device)
    x, out, down = (torch.zeros(rows, 1024).bfloat16() for rows in (256, 4096, 4096))
    assert joint.runs_joint_parts(x, out)
    assert not joint.runs_joint_parts(x[:, :960], down[:, :960].contiguous())  # parts of 3.75 steps
    assert not joint.runs_joint_parts(x.float(), out.float())
    with batch_invariant():
        assert not joint.runs_joint_parts(x, out)
        assert not joint.runs_early(256, 4096, device)


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


EARLY_ROWS = [129, 160, 250, 256]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", EARLY_ROWS)
@pytest.mark.parametrize(("dtype", "biased"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
def test_gpu_products_in_parts(rows: int, dtype: torch.dtype, biased: bool) -> None:
    for inner in (4096, 12288):
        x, layer = normal(1, rows, inner, dtype=dtype, device="cuda"), layer_of(2, 4096, inner, dtype, biased)
        assert joint.runs_joint_parts(x, layer[0])
        want = exact(x, layer)
        got = joint.joint_parts(x, *layer).double().sum(0)
        assert relative_error(got, want) <= 1.05 * relative_error(F.linear(x, *layer), want)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", EARLY_ROWS)
@pytest.mark.parametrize(("keys", "biased"), [(4096, False), (1024, True)])
def test_gpu_early_launches_wait_for_what_they_read(rows: int, keys: int, biased: bool) -> None:
    """Products and norms one after the other, as in blocks of a model: each exact, and the same in all runs."""
    wide, dtype = 4096, torch.bfloat16
    heads = [layer_of(10 * n, columns, wide, dtype, biased) for n, columns in enumerate((wide, keys, keys), 1)]
    out, gate, up = (layer_of(seed, size, wide, dtype, biased) for seed, size in ((40, wide), (50, 8192), (60, 8192)))
    down = layer_of(70, wide, 8192, dtype, biased)
    weight, given = normal(80, wide, dtype=dtype, device="cuda"), normal(81, rows, wide, dtype=dtype, device="cuda")

    def chain() -> list[Tensor]:
        stream, made = given.clone(), []
        normed = rms_norm(stream, weight, 1e-5)
        for _ in range(4):
            query, key, _ = joint.joint_linear(normed, *heads)
            parts = joint.joint_parts(query, *out)
            again = rms_norm(stream, weight, 1e-5, update=parts)
            hidden = joint.joint_swiglu(again, gate, up)
            back = joint.joint_parts(hidden, *down)
            made += [normed, query, key, parts, stream.clone(), again, hidden]
            normed = rms_norm(stream, weight, 1e-5, update=back)
        return [*made, stream, normed]

    first = [tensor.clone() for tensor in chain()]
    assert joint.runs_early(rows, wide, given.device)
    for place in range(0, len(first) - 2, 7):
        normed, query, key, parts, stream, again, hidden = first[place : place + 7]
        for got, layer in ((query, heads[0]), (key, heads[1]), (parts.double().sum(0), out)):
            rows_before = normed if layer is not out else query
            want = exact(rows_before, layer)
            assert relative_error(got, want) <= 1.05 * relative_error(want.to(dtype), want)
        want = rms_norm_reference(stream.double(), weight.double(), 1e-5, None)
        assert relative_error(again, want) <= 1.1 * relative_error(want.to(dtype), want)
        want = F.silu(exact(again, gate)) * exact(again, up)
        assert relative_error(hidden, want) <= 1.05 * relative_error(want.to(dtype), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = chain()
    for _ in range(30):
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(made, first, strict=True))
