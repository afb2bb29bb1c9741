"""Lean copies of modules compute what their originals do, share their weights and leave them alone; `combine`."""

# mypy: ignore-errors

from __future__ import annotations

import pytest
import torch

from mdkern.kernels.backbone.combine import combine, combine_operator
from mdkern.models.hf.lean import lean_copy
from tests.problems.canvas_models import small_model


def test_a_copy_computes_the_same_and_follows_the_weights() -> None:
    decoder = small_model().model.decoder
    layer, norm = decoder.layers[0], decoder.norm
    lean = lean_copy(decoder)
    x = torch.randn(2, 5, 32)
    weights, index = torch.rand(10, 2), torch.randint(0, 4, (10, 2))
    index[:, 0] = 3  # an expert without tokens is likely, too
    for _ in range(2):
        want = layer.experts(x.view(10, 32), index, weights), norm(x)
        got = lean.layers[0].experts(x.view(10, 32), index, weights), lean.norm(x)
        for ours, theirs in zip(got, want):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            layer.experts.down_proj.mul_(2.0)
            norm.weight.add_(1.0)
    assert "forward" not in vars(layer.experts)
    assert lean.layers[0].experts.down_proj is layer.experts.down_proj


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
