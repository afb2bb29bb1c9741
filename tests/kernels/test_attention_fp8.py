"""Attention in e4m3: the order of tokens, how weights are rounded, and what `scaled_heads` hands over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone import attention_fp8 as contract
from mdkern.kernels.backbone.attention_fp8 import (
    as_before,
    attention_fp8,
    attention_fp8_operator,
    attention_fp8_reference,
    fits,
    in_order,
    softmax_scale,
    weights_of,
)
from mdkern.kernels.backbone.linear_fp8 import (
    scaled_heads,
    scaled_heads_operator,
    scaled_heads_reference,
    scaled_product,
    scaled_rotary,
)
from mdkern.kernels.backbone.quantise import FP8, quantise_rows, rounded
from mdkern.kernels.invariant import batch_invariant
from tests.problems.backbone import normal


def question(batch: int, length: int, count: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, values and scales, as of heads of unit variance, some sharper than others."""
    heads = rounded(normal(1, batch * length, 2 * count * 64, device=device) * 8)
    values = rounded(normal(2, batch * count * 64, length, device=device) * 8)
    scale = softmax_scale(*(torch.full((count,), 8.0, device=device) for _ in range(2)))
    return heads, in_order(values.float()).to(FP8), scale * torch.linspace(0.5, 2.0, count, device=device)


def exact(heads: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    length, count = values.shape[1], len(scale)
    query, key = heads.double().view(-1, length, 2, count, 64).unbind(2)
    value = as_before(values.float()).double().view(-1, count, 64, length)
    exponent = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale.double()[:, None, None]
    weight = (exponent * math.log(2)).softmax(-1)
    return torch.einsum("bhqk,bhdk->bqhd", weight, value).flatten(2).flatten(0, 1)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_tokens_are_reordered_and_put_back() -> None:
    tokens = torch.arange(3 * 64).view(3, 64)
    ordered = in_order(tokens)
    assert ordered[1, 32:48].tolist() == [
        96 + place for place in (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
    ]
    assert torch.equal(as_before(ordered), tokens)


def test_weights_are_powers_of_two_up_to_the_stated_error() -> None:
    """6.2 % by the straight line between powers of two, 1/16 by rounding, in the range of normal numbers."""
    exponent = -torch.arange(0, 12, 0.001, dtype=torch.float64)
    weight = weights_of(exponent.float()).double()
    truth = (exponent + contract.LIFT).exp2()
    error = weight / truth - 1
    assert -0.0626 < error.min() < 0 < error.max() < 1.0625 * 1.0615 - 1
    whole = exponent == exponent.round()
    assert torch.equal(weight[whole], truth[whole])
    assert not weights_of(torch.tensor([-30.0, -1e30])).float().any()


def test_the_reference_is_near_the_softmax() -> None:
    question_ = question(2, 128, 3)
    assert distance(attention_fp8(*question_), exact(*question_)) < 0.05


def test_the_kernel_as_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of a program, and more keys than the ring has."""
    pytest.importorskip("triton")
    from mdkern.kernels.backbone import hopper_attention_fp8, launch_attention_fp8
    from tests.problems.gluon_on_cpu import OnCpu

    asked = question(2, 640, 2)
    kernel = OnCpu(hopper_attention_fp8.attention_fp8_kernel)
    monkeypatch.setattr(launch_attention_fp8, "attention_fp8_kernel", kernel)
    got, want = launch_attention_fp8.attention_fp8(*asked), attention_fp8_reference(*asked)
    assert distance(got.float(), want.float()) < 0.01


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def serves(length: int = 256, width: int = 768, head_dim: int = 64, device: str = "cuda") -> bool:
        return fits(torch.device(device), length, width, head_dim)

    monkeypatch.setattr(contract, "is_hopper", lambda _: False)
    assert not serves()
    assert serves(device="cpu")
    assert serves(device="cpu", width=192)
    monkeypatch.setattr(contract, "is_hopper", lambda _: True)
    assert serves()
    assert not serves(length=192)
    assert not serves(head_dim=32)
    assert not serves(width=192), "no kernel writes its queries, keys and values"
    with batch_invariant():
        assert not serves()
        assert not serves(device="cpu")


def test_heads_are_those_of_the_rotated_product() -> None:
    x, _ = quantise_rows(normal(1, 256, 48))
    weight, scale = quantise_rows(normal(2, 3 * 128, 48))
    scale, bias = scale / 10, normal(3, 3 * 128)
    angle = normal(4, 128, 32)
    heads, values = scaled_heads(x, weight, scale, bias, angle.cos(), angle.sin(), length=128)
    whole = scaled_rotary(x, weight, scale, bias, angle.cos(), angle.sin(), heads=4, length=128, dtype=torch.float32)
    assert torch.equal(heads.float(), rounded(whole[:, :256]).float())
    tokens = as_before(values.float()).view(2, 128, 128).transpose(1, 2).flatten(0, 1)
    assert torch.equal(tokens, rounded(scaled_product(x, weight, scale, bias)[:, 256:]).float())


def test_what_does_not_fit_is_refused() -> None:
    heads, values, scale = question(2, 128, 3)
    for refused, match in (
        ((heads.float(), values, scale), "heads must be"),
        ((heads[:, :-64], values, scale), "heads must be"),
        ((heads[:128], values, scale), "values must be"),
        ((heads[None], values, scale), "must be matrices"),
        ((heads, values[0], scale), "must be matrices"),
        ((heads, values[:, :64], scale), "sequences of 128s"),
        ((heads, values, scale[:2]), "must be"),
        ((heads, values, scale.double()), "scale must be"),
    ):
        with pytest.raises(ValueError, match=match):
            attention_fp8(*refused)
    x, _ = quantise_rows(normal(1, 256, 48))
    weight, steps = quantise_rows(normal(2, 3 * 128, 48))
    angle = normal(4, 128, 32)
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    with pytest.raises(ValueError, match="multiple of 128"):
        scaled_heads(x, weight, steps, steps, length=64, **tables)
    with pytest.raises(ValueError, match="queries, keys and values"):
        scaled_heads(x, weight[:-1], steps[:-1], steps[:-1], length=128, **tables)


def test_operators_are_registered_right() -> None:
    x, _ = quantise_rows(normal(1, 128, 48))
    weight, scale = quantise_rows(normal(2, 3 * 64, 48))
    angle = normal(4, 128, 32)
    for operator, arguments in (
        (attention_fp8_operator, question(1, 128, 2)),
        (scaled_heads_operator, (x, weight, scale, scale, angle.cos(), angle.sin(), 128)),
    ):  # PyTorch's test of the schema compares by a multiplication that e4m3 does not have
        torch.library.opcheck(operator, arguments, test_utils=("test_faketensor",))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "length", "count"), [(1, 128, 1), (3, 256, 3), (5, 640, 12), (16, 1024, 12), (1, 4096, 2)]
)
def test_the_kernel_is_the_reference(batch: int, length: int, count: int) -> None:
    """Up to products of which tensor cores keep 13 bits, by which a weight may fall to the next number of e4m3."""
    asked = question(batch, length, count, "cuda")
    got, want = attention_fp8(*asked), attention_fp8_reference(*asked)
    assert distance(got.float(), want.float()) < 0.02
    assert abs(distance(got.float(), exact(*asked)) / distance(want.float(), exact(*asked)) - 1) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length", "width"), [(8, 512, 768), (32, 128, 256), (43, 128, 768)])
def test_heads_of_the_kernel_are_the_reference(batch: int, length: int, width: int) -> None:
    x, _ = quantise_rows(normal(1, batch * length, width, device="cuda"))
    weight, scale = quantise_rows(normal(2, 3 * width, width, device="cuda"))
    angle = normal(3, length, 32, device="cuda")
    asked = (x, weight, scale * width**-0.5 * 20, normal(4, 3 * width, device="cuda"), angle.cos(), angle.sin())
    for got, want in zip(scaled_heads(*asked, length=length), scaled_heads_reference(*asked, length)):
        assert (got.view(torch.uint8) != want.view(torch.uint8)).double().mean() < 0.01
        assert distance(got.float(), want.float()) < 0.005
