"""`precision="fp8"`: errors within the bounds of the format, weights as they are now, and clear refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdkern import DiT, adapt, from_pretrained, sample
from mdkern.cli import main as cli
from mdkern.cli.report import number_formats
from mdkern.digest import model_digest
from mdkern.engine.graphs import mark_of
from mdkern.evaluation.importance import path_importance
from mdkern.kernels.backbone import attention_fp8
from mdkern.kernels.backbone.linear_fp8 import scaled_gelu, scaled_product
from mdkern.kernels.backbone.modulated_norm import modulated_norm_reference
from mdkern.kernels.backbone.quantise import quantised_norm
from mdkern.models import dit_fp8, dit_fused
from tests.problems.backbone import modulation, normal

MakeDiT = Callable[..., DiT]
SHAPE = {"width": 64, "num_heads": 4, "num_blocks": 3}


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).detach().norm() / exact.double().norm())


def norm_and_layer(width: int, columns: int) -> tuple[nn.Linear, tuple[Tensor, ...], dit_fp8.Quantised]:
    linear = nn.Linear(width, columns).requires_grad_(False)
    linear.weight.copy_(normal(1, columns, width) * width**-0.5)
    weight, shift, scale, _ = modulation(width, 0)
    layer = dit_fp8.new_layer(linear, "cpu")
    dit_fp8.quantise_after_norm(linear, weight, shift, scale, layer)
    return linear, (weight, shift, scale), layer


@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_a_product_is_within_the_steps_of_its_factors(mean: float) -> None:
    """Each factor moves by 1/16 at most, so each term by 1/8 and a bit; errors that have both signs add up to less."""
    linear, norm, layer = norm_and_layer(96, 64)
    x = normal(3, 40, 96) + mean
    got = scaled_product(quantised_norm(x), *layer).double()
    weight, shift, scale = (part.double() for part in norm)
    normed = modulated_norm_reference(x.double(), weight, shift, scale, None, None)
    exact = F.linear(normed, linear.weight.double(), linear.bias.double())
    factors = modulated_norm_reference(x.double(), weight, 0 * shift, scale, None, None), linear.weight.double()
    most = F.linear(factors[0].abs(), factors[1].abs()) * (1.0625**2 - 1)
    assert ((got - exact).abs() <= most * 1.01).all()
    assert relative_error(got, exact) < 0.05


def test_no_hidden_unit_leaves_the_range() -> None:
    """Not even of a row that points along the unit's weights, or against them."""
    linear, norm, layer = norm_and_layer(96, 64)
    layer.bias[0] = -100.0  # a unit that is always off, as far as GELU goes
    x = linear.weight * norm[0] * (1 + norm[2])
    x = torch.cat((x, -x, normal(3, 8, 96)))
    limit = dit_fp8.most_of_gelu(layer)
    units = scaled_product(quantised_norm(x), *layer)
    assert (F.gelu(units, approximate="tanh").abs() <= limit).all()
    assert units.amax(0).div(limit)[1:].min() > 0.7  # the bound is not far from what is reached
    level = 448 / limit
    got = scaled_gelu(quantised_norm(x), *layer, level).float() / level
    torch.testing.assert_close(got, F.gelu(units, approximate="tanh"), rtol=0.07, atol=1e-4)


def test_no_value_leaves_the_range() -> None:
    linear, norm, layer = norm_and_layer(96, 64)
    x = linear.weight * norm[0] * (1 + norm[2])
    limit = dit_fp8.most_of(layer)
    values = scaled_product(quantised_norm(torch.cat((x, -x))), *layer).abs()
    assert (values <= limit).all()
    assert values.amax(0).div(limit).min() > 0.7


def test_no_query_or_key_leaves_the_range() -> None:
    """However it is turned: two numbers that are turned into each other keep the length of their pair."""
    linear, norm, layer = norm_and_layer(96, 128)
    x = linear.weight * norm[0] * (1 + norm[2])
    level = dit_fp8.level_of_heads(dit_fp8.most_of(layer), 1)
    heads = scaled_product(quantised_norm(torch.cat((x, -x))), *layer).view(-1, 2, 2, 32)
    most = heads.norm(dim=2).amax((0, 2)) * level
    assert (most <= 448).all()
    assert most.min() > 0.4 * 448  # a row along one number's weights is seldom along its partner's


def question(model: DiT, rows: int | None, batch: int = 3, length: int = 16) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    positions = None if rows is None else torch.randint(length, (batch, rows), generator=generator)
    device = model.embedding.device
    return ids.to(device), None if positions is None else positions.to(device)


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("block_causal", [None, 4])
def test_a_pass_is_near_the_model(make_dit: MakeDiT, blocks: int, rows: int | None, block_causal: int | None) -> None:
    """Products of which each is 4 % off, on a stream that also has the part before them."""
    model = make_dit(**SHAPE | {"num_blocks": blocks, "block_causal": block_causal})
    ids, positions = question(model, rows)
    padding = torch.ones_like(ids, dtype=torch.bool)
    padding[0, 12:] = False
    exact = model.double().plain_hidden(ids, None, positions, padding).detach()
    got = adapt(model.float(), precision="fp8").hidden(ids, None, positions, padding)
    assert not got.requires_grad
    error = relative_error(got, exact)
    assert error < 0.1
    assert error > (1e-3 if blocks > 1 or rows is None else -1)  # it is rounded


@pytest.mark.parametrize("rows", [None, 5])
def test_attention_in_e4m3_is_near_the_model(
    make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    """It serves the blocks between the first and, where few rows are wanted, the last."""
    served, plain = list[int](), attention_fp8.attention_fp8
    monkeypatch.setattr(attention_fp8, "attention_fp8", lambda *parts: (served.append(1), plain(*parts))[1])
    model = make_dit(width=128, num_heads=2, num_blocks=3, max_length=128)
    ids, positions = question(model, rows, 2, 128)
    exact = model.double().plain_hidden(ids, None, positions).detach()
    denoiser = adapt(model.float(), precision="fp8")
    error = relative_error(denoiser.hidden(ids, None, positions), exact)
    assert len(served) == (2 if rows is None else 1)
    monkeypatch.setattr(attention_fp8, "fits", lambda *_: False)
    in_16_bits = relative_error(denoiser.hidden(ids, None, positions), exact)
    assert len(served) == (2 if rows is None else 1)
    assert in_16_bits != error
    assert error < 1.2 * in_16_bits < 0.1


def test_a_value_that_is_always_zero(make_dit: MakeDiT) -> None:
    """As of a model that is pruned: the range of what is always 0 is no number to divide by."""
    model = make_dit(**SHAPE)
    with torch.no_grad():
        for block in model.blocks:
            block.attn_qkv.weight[2 * SHAPE["width"] + 3] = 0.0  # type: ignore[index, operator, union-attr]
    ids, _ = question(model, None)
    got = adapt(model, precision="fp8").hidden(ids)
    assert relative_error(got, adapt(model).hidden(ids).detach()) < 0.1


@pytest.mark.parametrize("rows", [None, 5])
def test_prepared_or_not_with_or_without_a_cache(make_dit: MakeDiT, rows: int | None) -> None:
    model = make_dit(**SHAPE)
    ids, positions = question(model, rows)
    denoiser = adapt(model, precision="fp8")
    want = denoiser.hidden(ids, None, positions)
    assert torch.equal(denoiser.prepared(48).hidden(ids, None, positions), want)
    if positions is not None:
        cache = torch.zeros(denoiser.cache_shape(3, 16))
        torch.testing.assert_close(denoiser.window_hidden(cache, ids, None, positions), want)
        columns = torch.arange(16).expand(3, -1)
        torch.testing.assert_close(denoiser.window_hidden(cache, ids, columns, positions), want)


def test_it_follows_the_weights(make_dit: MakeDiT) -> None:
    model = make_dit(**SHAPE).requires_grad_(False)
    ids, _ = question(model, None)
    denoiser = adapt(model, precision="fp8")
    before = denoiser.prepared(48).hidden(ids)
    for block in model.blocks:
        block.mlp_down.weight.data.mul_(-2.0)
        block.modulation.bias.data.add_(0.3)
    for now in (denoiser, denoiser.current(), denoiser.prepared(48)):
        assert relative_error(now.hidden(ids), model.plain_hidden(ids)) < 0.1 < relative_error(before, now.hidden(ids))


def test_graphs_know_the_precision(make_dit: MakeDiT) -> None:
    model = make_dit(**SHAPE)
    first, second = (adapt(model, precision="fp8").prepared(48) for _ in range(2))
    assert mark_of(first) == mark_of(second)
    assert mark_of(first) != mark_of(adapt(model).prepared(48))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_sampling(make_dit: MakeDiT, cache: str) -> None:
    model = make_dit(**SHAPE, vocab_size=50, mask_id=49)
    options: dict[str, Any] = {"num_samples": 2, "length": 16, "decoder": "threshold", "seed": 1, "progress": False}
    options |= {} if cache == "none" else {"cache": cache, "block_length": 8}
    sequences = sample(adapt(model, precision="fp8"), **options).sequences
    assert (sequences != 49).all()
    assert dit_fused.PREPARED[model].fp8 is not None


def test_importance_rounds_the_weights_as_often_for_many_passes_as_for_few(
    make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded, plain = list[int](), dit_fp8.quantise_block
    monkeypatch.setattr(dit_fp8, "quantise_block", lambda *parts: (rounded.append(1), plain(*parts)))
    heavy, light = adapt(make_dit(**SHAPE), precision="fp8"), adapt(make_dit(**SHAPE))
    counts = []
    for segments in (1, 4):
        path_importance(heavy, light, num_samples=2, length=8, steps=4, segments=segments, progress=False)
        counts.append(len(rounded))
        rounded.clear()
    assert counts[0] == counts[1] > 0


def test_what_it_says(make_dit: MakeDiT, tmp_path: Any) -> None:
    model = make_dit(**SHAPE)
    denoiser = adapt(model, precision="fp8")
    assert denoiser.precision == "fp8"
    assert "e4m3" in repr(denoiser)
    assert f"{dit_fp8.extra_bytes(model) / 2**20:.1f} MiB more" in repr(denoiser)
    weights = 3 * (2 * 4 * 64 * 64) + 2 * (4 * 64 * 64)  # bytes; around the first block's attention nothing is rounded
    vectors = 4 * (3 * (3 * 256 + 2 * 64) + 2 * (2 * 192 + 3 * 64) + 2 * (2 * 192 + 4))
    assert dit_fp8.extra_bytes(model) == weights + vectors
    for precision in (None, "bf16"):
        assert adapt(model, precision=precision).precision is None
        assert "e4m3" not in repr(adapt(model, precision=precision))
    model.save_pretrained(tmp_path / "model")
    assert from_pretrained(tmp_path / "model", precision="fp8").precision == "fp8"


def test_resumed_runs_know_the_precision(make_dit: MakeDiT) -> None:
    model = make_dit(**SHAPE)
    own, rounded = (model_digest(adapt(model, precision=precision)) for precision in (None, "fp8"))
    assert own == model_digest(adapt(model, precision="bf16")) != rounded


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sample", "--device", "cpu", "--num-samples", "1", "--length", "16", "--steps", "4", "--seed", "1"]
    assert cli.main([*options, "--precision", "fp8"]) == 0
    assert "float32 in fp8" in capsys.readouterr().err
    assert cli.main([*options, "--precision", "bf16"]) == 0
    assert "fp8" not in capsys.readouterr().err


def test_the_summary_says_when_passes_are_too_small(make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where passes of fewer than 4,096 positions stay in 16 bits."""
    denoiser = adapt(make_dit(**SHAPE), precision="fp8", head_precision="fp8")
    assert number_formats(denoiser, 4095) == "float32 in fp8 (output layer in fp8)"
    monkeypatch.setattr(dit_fused, "pays", lambda rows, _: rows >= 4096)
    assert number_formats(denoiser, 4096) == "float32 in fp8 (output layer in fp8)"
    assert number_formats(denoiser, 4095) == (
        "float32, not fp8 as no pass has more than 4,095 positions (output layer in fp8)"
    )


def test_what_it_refuses(make_dit: MakeDiT) -> None:
    with pytest.raises(ValueError, match="conditioned on the time"):
        adapt(make_dit(**SHAPE, time_conditioning=True), precision="fp8")
    with pytest.raises(ValueError, match=r"model\.float"):
        adapt(make_dit(**SHAPE).double(), precision="fp8")
    with pytest.raises(ValueError, match="precision must be"):
        adapt(make_dit(**SHAPE), precision="fp4")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"autocast .* outside"):
        sample(adapt(make_dit(**SHAPE), precision="fp8"), num_samples=1, length=4, progress=False)
    model = make_dit(**SHAPE)
    kept = adapt(model, precision="fp8")
    model.blocks[1].mlp_up.register_forward_hook(lambda *_: None)
    for refused in (
        lambda: adapt(model, precision="fp8"),
        kept.current,
        lambda: kept.hidden(torch.zeros(1, 4, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"blocks\.1\.mlp_up is not as mdkern made it"):
            refused()
    with pytest.raises(ValueError, match="where the model is adapted"):
        adapt(adapt(make_dit(**SHAPE)), precision="fp8")
    with pytest.raises(ValueError, match="where the model is adapted"):
        adapt(adapt(make_dit(**SHAPE), precision="fp8"), precision="bf16")
    with pytest.raises(ValueError, match="own DiT"):
        adapt(lambda ids: F.one_hot(ids, 10).float(), vocab_size=10, mask_id=9, precision="fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize("rows", [None, 8])
def test_a_gpu_pass_is_as_near_as_the_reference(make_dit: MakeDiT, width: int, rows: int | None) -> None:
    """By the Hopper kernels (width 768) and by PyTorch's products (192)."""
    model = make_dit(width=width, num_heads=width // 64, num_blocks=3, max_length=512).requires_grad_(False)
    ids, positions = question(model, rows, 8, 512)
    exact = model.double().plain_hidden(ids, None, positions)
    theirs = relative_error(adapt(model.float(), precision="fp8").hidden(ids, None, positions), exact)
    model.to("cuda", torch.bfloat16)
    denoiser = adapt(model, precision="fp8")
    with torch.no_grad():
        got = denoiser.prepared(ids.numel()).hidden(ids.cuda(), None, None if positions is None else positions.cuda())
    assert relative_error(got.cpu(), exact) < 1.15 * math.hypot(theirs, 0.01)


@pytest.mark.gpu
def test_gpu_runs_with_graphs_and_caches(make_dit: MakeDiT) -> None:
    model = make_dit(width=256, num_heads=4, num_blocks=3, max_length=512).to("cuda", torch.bfloat16)
    options: dict[str, Any] = {"num_samples": 16, "length": 512, "steps": 32, "seed": 1, "progress": False}
    denoiser = adapt(model, precision="fp8")
    first, second = (sample(denoiser, **options).sequences for _ in range(2))
    assert torch.equal(first, second)
    eager = sample(denoiser, **options, cuda_graphs=False).sequences  # its last passes may be smaller
    assert (eager == first).double().mean() > 0.9
    with pytest.raises(ValueError, match=r"model\.bfloat16"):
        adapt(model.float(), precision="fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 256])
def test_gpu_bits_do_not_depend_on_the_batch(make_dit: MakeDiT, width: int) -> None:
    """By PyTorch's products (192) and by the Hopper kernels (256), which in this mode take few rows, too."""
    model = make_dit(width=width, num_heads=width // 64, num_blocks=3, max_length=128).to("cuda", torch.bfloat16)
    denoiser = adapt(model, precision="fp8")
    options: dict[str, Any] = {"length": 128, "steps": 16, "seed": 1, "progress": False}
    options |= {"batch_invariant": True, "return_history": True}
    many, one = sample(denoiser, num_samples=40, **options), sample(denoiser, num_samples=1, sample_ids=[7], **options)
    assert torch.equal(one.sequences[0], many.sequences[7])
    assert torch.equal(one.history.log_prob[0], many.history.log_prob[7])
