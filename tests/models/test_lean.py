"""Lean copies of modules compute what their originals do, share their weights and leave them alone; `combine`."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdkern.kernels.backbone.combine import combine, combine_operator
from mdkern.models.hf import lean
from mdkern.models.hf.block_diffusion import BlockDiffusion
from mdkern.models.hf.lean import lean_copy
from tests.problems.canvas_models import small_model


def test_a_copy_computes_the_same_and_follows_the_weights() -> None:
    decoder = small_model().model.decoder
    layer, norm = decoder.layers[0], decoder.norm
    copied = lean_copy(decoder)
    x = torch.randn(2, 5, 32)
    weights, index = torch.rand(10, 2), torch.randint(0, 4, (10, 2))
    index[:, 0] = 3  # an expert without tokens is likely, too
    for _ in range(2):
        want = layer.experts(x.view(10, 32), index, weights), norm(x)
        got = copied.layers[0].experts(x.view(10, 32), index, weights), copied.norm(x)
        for ours, theirs in zip(got, want):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            layer.experts.down_proj.mul_(2.0)
            norm.weight.add_(1.0)
    assert "forward" not in vars(layer.experts)
    assert copied.layers[0].experts.down_proj is layer.experts.down_proj


def passes(model: Any, rows: Any, lean: bool) -> torch.Tensor:
    """Hidden states of canvases after prompts, one of them padded, by the model's own modules or by lean copies."""
    network = BlockDiffusion(model)
    network.decoder, network.encoder = model.model.decoder, model.model.encoder
    if lean:
        network.decoder, network.encoder = lean_copy(network.decoder), lean_copy(network.encoder)
    device = network.device
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[0, :3] = False
    cache = network.new_cache(32)
    with torch.no_grad():
        network.encode(rows["ids"], network.encoder_masks(rows["ids"], mask, cache, {}), cache, {})
        masks = network.masks(2, torch.nn.functional.pad(mask, (0, 8), value=True), cache)
        positions = torch.arange(9, 17, dtype=torch.int32, device=device)[None]
        return network.hidden(rows["canvas"], rows["soft"], positions, masks, cache)


def uneven_problem() -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with every weight, scale and factor away from 1, and what its passes take."""
    model, generator = small_model(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(layer.layer_scalar for layer in model.model.decoder.layers)):
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    rows = {
        "ids": torch.randint(3, 60, (2, 9), generator=generator),
        "canvas": torch.randint(3, 60, (2, 8), generator=generator),
        "soft": torch.randn(2, 8, 32, generator=generator),
    }
    return model, rows


@pytest.mark.gpu
def test_gpu_encoder_and_decoder_are_the_models() -> None:
    """By the kernels of a GPU, beside the model's own layers there, in float32."""
    model, rows = uneven_problem()
    want = passes(model, rows, lean=False)
    model, rows = model.to("cuda"), {name: tensor.cuda() for name, tensor in rows.items()}
    for by_copies in (False, True):
        torch.testing.assert_close(passes(model, rows, by_copies).cpu(), want, rtol=1e-3, atol=1e-3)


CHANGES = "nothing", "a norm has a hook", "a router has a forward of its own", "a layer has a hook", "the last norm has"


def moved(output: torch.Tensor) -> None:
    """In place."""
    output.add_(0.5)


@pytest.mark.parametrize("changed", CHANGES)
def test_encoder_and_decoder_are_the_models(changed: str) -> None:
    """In float32, in which roundings hardly differ."""
    model, rows = uneven_problem()
    decoder = model.model.decoder
    plain = passes(model, rows, lean=False)
    if changed == "a norm has a hook":
        decoder.layers[0].post_feedforward_layernorm.register_forward_hook(lambda _, __, output: 2.0 * output)
        decoder.layers[1].input_layernorm.register_forward_hook(lambda _, __, output: 2.0 * output)
        decoder.layers[1].self_attn.k_norm.register_forward_hook(lambda _, __, output: 0.5 * output)
    if changed == "a router has a forward of its own":
        router = decoder.layers[0].router
        weights = torch.ones(16, 1), torch.full((16, 1), 2)
        router.forward = lambda _: (None, *weights)
    if changed == "a layer has a hook":
        decoder.layers[0].register_forward_hook(lambda _, __, output: moved(output))
    if changed == "the last norm has":
        decoder.norm.register_forward_pre_hook(lambda _, given: (given[0] * 0.1 + 1.0,))
    want = passes(model, rows, lean=False)
    assert torch.equal(want, plain) == (changed == "nothing")
    torch.testing.assert_close(passes(model, rows, lean=True), want, rtol=1e-4, atol=1e-5)


def test_attention_of_some_texts_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = uneven_problem()
    want, parts = passes(model, rows, lean=False), []
    attend_in_parts = lean.attend_in_parts
    monkeypatch.setattr(lean, "attend_in_parts", lambda *given: parts.append(given[-1]) or attend_in_parts(*given))
    monkeypatch.setattr(lean, "MOST_REPEATED", 1)
    torch.testing.assert_close(passes(model, rows, lean=True), want, rtol=1e-4, atol=1e-5)
    assert parts == [1] * 4, "the masked attention of two layers of the encoder and two of the decoder"


def test_norms_without_a_scale_and_in_bfloat16() -> None:
    layer = small_model().model.decoder.layers[0].bfloat16()
    x = torch.randn(3, 32).bfloat16()
    for own in (layer.router.norm, layer.input_layernorm):
        assert torch.equal(lean_copy(own)(x), own(x))


def test_a_forward_of_ones_own_is_kept() -> None:
    norm = small_model().model.decoder.norm
    norm.forward = lambda x: x + 1
    assert torch.equal(lean_copy(norm)(torch.zeros(1, 32)), torch.ones(1, 32))


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(40, 1500, generator=generator).to(dtype)
    place = torch.randint(0, 40, (13, 3), generator=generator)
    weights = torch.randn(13, 3, generator=generator)
    return rows.to(device), place.to(device), weights.to(device)


def test_combine_is_the_weighted_sum() -> None:
    rows, place, weights = problem()
    want = torch.einsum("tk,tkd->td", weights.double(), rows.double()[place])
    torch.testing.assert_close(combine(rows, place, weights).double(), want, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(combine_operator, (rows, place, weights))


def test_combine_refuses_what_does_not_fit() -> None:
    rows, place, weights = problem()
    for arguments in ((rows.T, place, weights), (rows, place[0], weights), (rows, place, weights[1:])):
        with pytest.raises(ValueError, match="must be"):
            combine(*arguments)
    with pytest.raises(ValueError, match="place must be"):
        combine(rows, place.int(), weights)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_combine_is_the_references(dtype: torch.dtype) -> None:
    arguments = problem("cuda", dtype)
    want = combine(*problem("cpu", dtype))
    torch.testing.assert_close(
        combine(*arguments).cpu(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
