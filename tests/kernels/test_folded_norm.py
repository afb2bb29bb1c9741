"""Norms folded into the products that follow them: the same function, exact whatever the mean, never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern import DiT, adapt, sample
from mdkern.engine.graphs import mark_of
from mdkern.kernels.backbone import folded_norm
from mdkern.kernels.backbone import linear as products
from mdkern.kernels.backbone.folded_norm import fold_norm, new_sums, row_sums
from mdkern.kernels.backbone.linear import linear_gelu, linear_residual, linear_rotary
from mdkern.kernels.backbone.modulated_norm import modulated_norm_reference
from mdkern.models import dit_fused
from mdkern.models.denoiser import PREPARED
from tests.problems.backbone import modulation, normal

MakeDiT = Callable[..., DiT]
WIDE = {"width": 256, "num_heads": 4, "num_blocks": 3}
WIDER = {"width": 512, "num_heads": 8, "num_blocks": 3, "max_length": 512}
NARROW = {"width": 192, "num_heads": 3, "num_blocks": 3, "max_length": 512}


def folded_layer(width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """weight, bias, the norm's weight, shift, scale; and the folded two."""
    weight = (normal(1, 3 * width, width) * width**-0.5).to(device, dtype)
    layer = [weight, normal(2, 3 * width, dtype=dtype, device=device), *modulation(width, 0, dtype, device)[:3]]
    out = torch.empty_like(weight), torch.empty_like(layer[1])
    fold_norm(*layer, out=out)
    return layer, out


def product_of_norm(x: Tensor, layer: list[Tensor]) -> Tensor:
    """In float64, by the definition."""
    weight, bias, *norm = (tensor.double() for tensor in layer)
    return F.linear(modulated_norm_reference(x.double(), *norm, None, None), weight, bias)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("mean", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("width", [256, 768])
def test_the_product_of_the_stream_is_that_of_its_norm(mean: float, width: int) -> None:
    layer, folded = folded_layer(width, torch.float64)
    x = normal(3, 12, width).double() + mean
    exact = product_of_norm(x, layer)
    torch.testing.assert_close(linear_gelu(x, *folded, sums=row_sums(x)), F.gelu(exact, approximate="tanh"))
    still = torch.ones(4, 32, dtype=torch.float64), torch.zeros(4, 32, dtype=torch.float64)
    got = linear_rotary(x, folded[0], *still, heads=4, length=4, bias=folded[1], sums=row_sums(x))
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("weight", [1.0, 0.75])
def test_rounded_rows_sum_to_nothing(dtype: torch.dtype, spread: float, weight: float) -> None:
    """So the error does not grow with the mean, and is about that of the rounding, of constant modulation too."""
    matrix = normal(1, 300, 768, dtype=dtype) * 0.02
    norm = (weight + spread * normal(2, 768)).to(dtype)
    nothing = torch.zeros(768, dtype=dtype)
    folded, _ = out = torch.empty_like(matrix), matrix.new_empty(300)
    fold_norm(matrix, None, norm, nothing, nothing, out=out)
    assert (folded.double().sum(1).abs() < 1e-5 * folded.double().abs().sum(1)).all()
    exact = matrix.double() * norm.double()
    exact -= exact.mean(1, keepdim=True)
    assert relative_error(folded, exact) < 1.5 * relative_error(exact.to(dtype), exact)
    assert float((folded.double() - exact).abs().max()) < 0.1 * float(exact.square().mean().sqrt())


def test_a_residual_leaves_the_sums_of_its_rows() -> None:
    x, weight, gate = normal(1, 12, 20), normal(2, 512, 20), normal(3, 512)
    stream = normal(4, 12, 512)
    sums = new_sums(stream)
    linear_residual(stream, x, weight, None, gate, sums=sums)
    parts = stream.view(12, 2, 256)
    torch.testing.assert_close(sums[:, 0].T, parts.sum(2))
    torch.testing.assert_close(sums[:, 1].T, parts.square().sum(2))
    spread = stream.var(1, unbiased=False)
    torch.testing.assert_close(folded_norm.one_over_spread(sums, 512), (spread + 1e-5).rsqrt())


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight, bias = normal(1, 12, 256), normal(2, 256, 256), normal(3, 256)
    with pytest.raises(ValueError, match="sums"):
        linear_gelu(x, weight, bias, sums=row_sums(x)[:, :, 1:])
    with pytest.raises(ValueError, match="sums"):
        linear_residual(x, x, weight, None, bias, sums=row_sums(x).double())
    with pytest.raises(ValueError, match="shift"):
        fold_norm(weight, bias, bias, bias[1:], bias, out=(weight.clone(), bias.clone()))
    with pytest.raises(ValueError, match="out"):
        fold_norm(weight, bias, bias, bias, bias, out=(weight[1:].clone(), bias.clone()))


def test_the_operators_are_well_registered() -> None:
    check, (layer, folded) = torch.library.opcheck, folded_layer(256, torch.float32)
    x, angle = normal(3, 12, 256), normal(4, 6, 32)
    check(folded_norm.fold_norm_operator, (*folded, *layer))
    check(products.linear_rotary_operator, (x, folded[0], angle.cos(), angle.sin(), 4, 6, folded[1], row_sums(x)))
    check(products.linear_gelu_operator, (x, *folded, row_sums(x)))
    check(products.linear_residual_operator, (x, x.clone(), normal(5, 256, 256), None, normal(6, 256), new_sums(x)))


# The whole.


def question(model: DiT, batch: int, length: int, rows: int | None) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(batch * length)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    positions = None if rows is None else torch.randint(length, (batch, rows), generator=generator)
    device = model.embedding.device
    return ids.to(device), None if positions is None else positions.to(device)


@pytest.fixture
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a Hopper GPU, by the operators' plain forms."""
    monkeypatch.setattr(products, "FEWEST_ROWS", 1)

    monkeypatch.setattr(dit_fused, "is_hopper", lambda device: True)
    monkeypatch.setattr(products, "adds_in_place", lambda *_: True)
    monkeypatch.setattr(dit_fused, "covers", lambda model: True)


@pytest.mark.usefixtures("fused_everywhere")
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("largest_table", [dit_fused.LARGEST_TABLE, 0])
def test_it_is_the_modules_function(
    make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch, blocks: int, rows: int | None, largest_table: int
) -> None:
    monkeypatch.setattr(dit_fused, "LARGEST_TABLE", largest_table)
    monkeypatch.setattr(dit_fused, "TABLE_PART", 7)  # of the 100 rows
    model = make_dit(**WIDE | {"num_blocks": blocks}).requires_grad_(False)
    ids, positions = question(model, 3, 16, rows)
    prepared = adapt(model).prepared(ids.numel())
    assert (prepared.folds.qkv is not None) == bool(largest_table)
    got = prepared.hidden(ids, None, positions)
    torch.testing.assert_close(got, model.plain_hidden(ids, None, positions), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fused_everywhere")
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("blocks", [1, 3])
def test_no_sums_are_made_that_nobody_reads(
    make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch, blocks: int, rows: int | None
) -> None:
    made, read = [], []

    def noting(product: Callable[..., Any], sums_of: list[Tensor]) -> Callable[..., Any]:
        def noted(*arguments: Any, sums: Tensor | None = None, **options: Any) -> Any:
            if sums is not None:
                sums_of.append(sums)
            return product(*arguments, sums=sums, **options)

        return noted

    for name, sums_of in (("linear_residual", made), ("linear_gelu", read), ("linear_rotary", read)):
        monkeypatch.setattr(products, name, noting(getattr(products, name), sums_of))
    model = make_dit(**WIDE | {"num_blocks": blocks}).requires_grad_(False)
    ids, positions = question(model, 3, 16, rows)
    adapt(model).prepared(ids.numel()).hidden(ids, None, positions)
    assert len(made) == 2 * blocks - 1
    assert all(one is other for one, other in zip(made, read, strict=True))


@pytest.mark.usefixtures("fused_everywhere")
def test_each_preparation_sees_the_weights_as_they_are(make_dit: MakeDiT) -> None:
    """Changed in place, assigned anew, added to, cast: without preparation, too. Two models share nothing."""
    model, other = make_dit(**WIDE).requires_grad_(False), make_dit(**WIDE).requires_grad_(False)
    ids, positions = question(model, 3, 16, 5)

    def change_in_place() -> None:
        model.blocks[1].attn_qkv.weight.data.mul_(1.5)
        model.blocks[0].modulation.bias.data.add_(0.1)

    def assign() -> None:
        model.blocks[2].mlp_up.weight = torch.nn.Parameter(normal(9, 256, 1024).T * 0.02, requires_grad=False)

    def lengthen() -> None:
        model.blocks.append(copy.deepcopy(model.blocks[0]))

    def cast() -> None:
        model.bfloat16().blocks[0].mlp_up.weight.mul_(1.5)

    before = adapt(model).prepared(48).hidden(ids, None, positions)
    adapt(other).prepared(48)
    for change in (change_in_place, assign, lengthen, cast):
        change()
        want = model.plain_hidden(ids, None, positions)
        assert relative_error(before, want) > 0.05
        denoiser = adapt(model)
        for hidden in (denoiser.prepared(48).hidden, denoiser.hidden, model.hidden):
            assert relative_error(hidden(ids, None, positions), want) < (0.02 if change is cast else 1e-5)
        before = want


@pytest.mark.usefixtures("fused_everywhere")
def test_graphs_know_whose_memory_they_read(make_dit: MakeDiT) -> None:
    """The same graphs serve the next call, and no graph serves a denoiser that is not prepared or lies elsewhere."""
    model = make_dit(**WIDE).requires_grad_(False)
    denoiser = adapt(model)
    first, second = denoiser.prepared(48), adapt(model).prepared(48)
    assert mark_of(first) == mark_of(second) != mark_of(denoiser)
    PREPARED.clear()
    assert mark_of(denoiser.prepared(48)) != mark_of(first)


@pytest.mark.usefixtures("fused_everywhere")
def test_each_call_of_sample_folds_anew(make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_dit(**WIDE, vocab_size=50, mask_id=49).requires_grad_(False)

    def tokens() -> Tensor:
        return sample(model, num_samples=8, length=16, steps=16, temperature=0.0, seed=1, progress=False).sequences

    first = tokens()
    assert model in PREPARED
    for block in model.blocks:
        block.attn_qkv.weight.data.mul_(-2.0)
        block.mlp_up.weight.data.mul_(-2.0)
    second = tokens()
    monkeypatch.setattr(dit_fused, "covers", lambda model: False)
    assert torch.equal(second, tokens())
    assert not torch.equal(second, first)


@pytest.mark.usefixtures("fused_everywhere")
def test_what_inference_mode_made_serves_outside_of_it(make_dit: MakeDiT) -> None:
    model = make_dit(**WIDE, vocab_size=50, mask_id=49).requires_grad_(False)
    options = {"num_samples": 2, "length": 16, "steps": 8, "seed": 1, "progress": False}
    with torch.inference_mode():
        inside = sample(model, **options).sequences
    assert torch.equal(sample(model, **options).sequences, inside)


def test_a_model_that_is_moved_away_leaves_nothing(make_dit: MakeDiT) -> None:
    model = make_dit(**WIDE).requires_grad_(False)
    PREPARED[model] = ()
    adapt(model).prepared(48)
    assert model not in PREPARED


def test_where_it_does_not_serve_nothing_is_made(make_dit: MakeDiT, fused_everywhere: None) -> None:
    def serves(rows: int = 48, **shape: object) -> bool:
        denoiser = adapt(make_dit(**WIDE | shape))
        return denoiser.prepared(rows) is not denoiser

    assert serves()
    assert not serves(time_conditioning=True)
    assert not serves(width=128)
    assert not serves(num_heads=8)
    assert not serves(rows=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("rows", [16_384, 6003])
def test_gpu_products_are_as_exact_as_with_norms(dtype: torch.dtype, mean: float, rows: int) -> None:
    layer, folded = folded_layer(768, dtype, "cuda")
    plain = torch.empty_like(folded[0]), torch.empty_like(folded[1])
    folded_norm.fold_norm_reference(*plain, *layer)
    assert (folded[0].double().sum(1).abs() < 1e-6 * folded[0].double().abs().sum(1)).all()
    torch.testing.assert_close(folded, plain, rtol=0.01, atol=1e-3)
    x = (normal(3, rows, 768) + mean).to("cuda", dtype)
    normed = modulated_norm_reference(x, *layer[2:], None, None)
    exact = product_of_norm(x, layer)
    angle = normal(4, 333, 32).cuda()
    cos, sin = angle.cos(), angle.sin()
    got, sums = linear_gelu(x, *folded, sums=row_sums(x)), new_sums(x)
    want = F.gelu(exact, approximate="tanh")
    assert relative_error(got, want) < 1.4 * relative_error(linear_gelu(normed, *layer[:2]), want)
    got = linear_rotary(x, folded[0], cos, sin, heads=24, length=333, bias=folded[1], sums=row_sums(x))
    theirs = linear_rotary(normed, layer[0], cos, sin, heads=24, length=333, bias=layer[1])
    want = exact.clone()
    products.rotary(want.view(rows, 36, 64)[:, :24], cos.double(), sin.double(), length=333)
    assert relative_error(got, want) < 1.4 * relative_error(theirs, want)
    linear_residual(x, normed, layer[0][:768], None, layer[2], sums=sums)
    spread = folded_norm.one_over_spread(row_sums(x.double()), 768)
    assert relative_error(folded_norm.one_over_spread(sums, 768), spread) < 0.01  # they are of the rows before rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("shape", [WIDER, NARROW])
@pytest.mark.parametrize("rows", [None, 8])
def test_it_is_as_exact_as_the_modules(
    make_dit: MakeDiT,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    mean: float,
    shape: dict[str, int],
    rows: int | None,
) -> None:
    """Error against float64 at most 1.2 times that of PyTorch's own operators in the same 16-bit format."""
    model = make_dit(**shape).requires_grad_(False)
    model.embedding += mean * model.embedding.std()
    model = model.to("cuda", dtype)
    exact = make_dit(**shape).to("cuda", torch.float64)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad():
        ids, positions = question(
            model, 16 if model.config.width > 256 else 8, 512, rows
        )  # so many that norms are folded
        want = exact.plain_hidden(ids, None, positions)
        theirs = model.plain_hidden(ids, None, positions)
        prepared = adapt(model).prepared(ids.numel())
        assert prepared.folds is not None or not dit_fused.is_hopper(model.embedding.device)
        ours = prepared.hidden(ids, None, positions)
        few = prepared.hidden(ids[:2], None, None if positions is None else positions[:2])
    assert relative_error(ours, want) < 1.2 * relative_error(theirs, want)
    assert relative_error(few, want[:2]) < 1.2 * relative_error(theirs[:2], want[:2])


@pytest.mark.gpu
def test_a_graph_sees_what_the_next_preparation_makes(make_dit: MakeDiT) -> None:
    model = make_dit(**WIDER).requires_grad_(False).to("cuda", torch.bfloat16)
    with torch.no_grad():
        ids, positions = question(model, 16, 512, 8)
        prepared = adapt(model).prepared(ids.numel())
        before = prepared.hidden(ids, None, positions)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = prepared.hidden(ids, None, positions)
        model.blocks[1].attn_qkv.weight *= 1.5
        again = adapt(model).prepared(ids.numel())
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, again.hidden(ids, None, positions))
        assert relative_error(captured, model.hidden(ids, None, positions)) < 0.02 < relative_error(captured, before)
