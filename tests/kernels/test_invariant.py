"""The batch-invariant mode: launchers choose the same whatever the number of rows, and our kernels stand in for
PyTorch's wherever a module calls them."""

# mypy: ignore-errors

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from mdkern.kernels import invariant
from mdkern.kernels.backbone import (
    invariant_attention,
    invariant_linear,
    joint,
    launch_linear,
    linear,
    skinny,
    triton_invariant_attention,
    triton_invariant_linear,
    triton_modulated_norm,
    triton_rotary,
)
from mdkern.kernels.head import launch, launch_filter, launch_hopper
from mdkern.kernels.head.arguments import Filters, Head, Rows, Wanted
from mdkern.kernels.invariant import batch_invariant, is_batch_invariant
from mdkern.models import dit_fused
from tests.problems.backbone import modulation, normal

ROWS = (1, 3, 16, 17, 200, 1030, 4096, 5000)
HALF = torch.bfloat16


class Noted:
    """In a kernel's place: keeps the constants that it is launched with."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: self.launches.append(constants)

    def kinds(self) -> set[str]:
        return {str(sorted(launch.items(), key=str)) for launch in self.launches}


def noted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Noted:
    kernel = Noted()
    monkeypatch.setattr(module, name, kernel)
    return kernel


def test_norms_and_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = noted(monkeypatch, triton_modulated_norm, "modulated_norm_kernel")
    turn = noted(monkeypatch, triton_rotary, "rotary_kernel")
    angle = normal(4, 5000, 8)

    def launch_all(sequences: int) -> None:
        for rows in ROWS:
            x = normal(1, rows * max(sequences, 1), 32)
            triton_modulated_norm.modulated_norm(x, *modulation(32, sequences)[:3], None, None)
            triton_rotary.rotary(x.view(-1, 2, 16), angle, angle, None, 5000)

    for sequences in (0, 1, 4):
        with batch_invariant():
            launch_all(sequences)
        if sequences != 1:  # one sequence runs as several do
            assert len(norm.kinds()) == len(turn.kinds()) == 1
            norm.launches.clear()
    turn.launches.clear()
    launch_all(0)
    assert len(norm.kinds()) == len(turn.kinds()) == 2  # so the mode makes a difference here


def test_products(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = noted(monkeypatch, triton_invariant_linear, "invariant_linear_kernel")
    fused = noted(monkeypatch, launch_linear, "linear_kernel")
    added = noted(monkeypatch, launch_linear, "linear_residual_kernel")
    monkeypatch.setattr(launch_linear, "num_sms", lambda device: 132)
    weight, bias = normal(1, 256, 64).to(HALF), normal(2, 256).to(HALF)

    def launch_all() -> None:
        for rows in ROWS:
            x, stream = normal(3, rows, 64).to(HALF), normal(4, rows, 256).to(HALF)
            triton_invariant_linear.invariant_linear(x, weight, bias)
            launch_linear.linear(x, weight, stream, bias=bias)
            launch_linear.linear_residual(stream, x, weight, None, bias, None)

    with batch_invariant():
        launch_all()
    assert len(plain.kinds()) == len(fused.kinds()) == len(added.kinds()) == 1
    launch_all()
    assert len(fused.kinds()) > 2


def test_hopper_runs_its_products_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, other in ((linear, "copies_in_bulk"), (skinny, "fits"), (joint, "fits")):
        for name in ("is_hopper", other):
            monkeypatch.setattr(module, name, lambda *_: True)
    monkeypatch.setattr(joint, "pays", lambda *_: True)
    weight, gate = normal(1, 256, 256).to(HALF), normal(2, 256).to(HALF)
    for rows in ROWS:
        x = torch.ones(rows, 256, dtype=HALF)
        assert linear.runs_fused(x, weight) == (rows >= linear.FEWEST_ROWS)
        assert skinny.runs_skinny(x, weight) == (rows <= skinny.MOST_ROWS)
        for runs in (joint.runs_joint_linear, joint.runs_joint_swiglu):
            assert runs(x, weight, gate) == (rows <= joint.MOST_ROWS)
        with batch_invariant():
            assert linear.runs_fused(x, weight)
            assert not skinny.runs_skinny(x, weight)
            assert not joint.runs_joint_linear(x, weight, gate)
            assert not joint.runs_joint_swiglu(x, weight, gate)
            assert linear.adds_in_place(x, weight, gate)
            assert not linear.adds_in_place(x, weight, gate.expand(rows, -1))  # whose tiles depend on the length


def test_folds_are_made_for_any_number_of_rows(make_dit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit_fused, "is_hopper", lambda device: True)
    model = make_dit(width=256, num_heads=4)
    assert not dit_fused.folds_fit(model, 16)
    with batch_invariant():
        assert dit_fused.folds_fit(model, 16)


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = noted(monkeypatch, triton_invariant_attention, "invariant_attention_kernel")
    for batch, queries, keys in ((1, 7, 7), (16, 7, 100), (3, 500, 513)):
        query, key = normal(1, batch, 2, queries, 16).to(HALF), normal(2, batch, 2, keys, 16).to(HALF)
        for mask in (None, torch.ones(batch, 1, 1, keys, dtype=torch.bool)):
            triton_invariant_attention.invariant_attention(query, key, key, mask, 0.25)
    assert len(kernel.launches) == 6
    assert len(kernel.kinds()) == 1


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("filters", [None, Filters(top_p=0.9)])
def test_output_layer(monkeypatch: pytest.MonkeyPatch, hopper: bool, filters: Filters | None) -> None:
    monkeypatch.setattr(launch, "hopper_launcher", lambda device: launch_hopper if hopper else None)
    monkeypatch.setattr(launch, "num_sms", lambda device: 132)
    kernels = [
        noted(monkeypatch, launch_filter.kernels, "filtered_logits_kernel"),
        noted(monkeypatch, launch_filter.kernels, "filtered_draw_kernel"),
    ]
    if filters is None:
        first = (launch_hopper.hopper_projection, "vocab_projection_hopper_kernel")
        first = first if hopper else (launch.kernels, "vocab_projection_kernel")
        kernels = [noted(monkeypatch, *first), noted(monkeypatch, launch, "vocab_projection_reduce_kernel")]
        noted(monkeypatch, launch_hopper, "project_skinny")
    weight = normal(1, 2000, 64).to(HALF)

    def launch_all() -> None:
        for count in ROWS:
            hidden = normal(2, count, 64).to(HALF)
            keys = torch.zeros(count, 3, dtype=torch.int64)
            rows = Rows(torch.arange(count), None, None, 1.0, torch.tensor(0), keys)
            given = (hidden, Head(weight, None, 1.0, 0.0), rows, Wanted(True, True))
            launch.vocab_projection(*given, *([] if filters is None else [filters]))

    with batch_invariant():
        launch_all()
    assert [len(kernel.kinds()) for kernel in kernels] == [1, 1]


def test_modules_run_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def noting(name: str, function: Any) -> Any:
        return lambda *arguments, **options: called.append(name) or function(*arguments, **options)

    for place, function in list(invariant.OURS.items()):
        monkeypatch.setitem(invariant.OURS, place, noting(function.__name__, function))
    monkeypatch.setattr(linear, "invariant_linear", noting("operator's product", linear.invariant_linear))
    layer, x = nn.Linear(8, 6), normal(1, 2, 3, 8)
    heads = normal(2, 2, 4, 3, 8)
    mask = torch.tensor([[True, True, False]])
    with torch.no_grad(), batch_invariant():
        product = layer(x)
        attended = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask, scale=0.5)
        linear.linear_gelu(x[0], layer.weight, layer.bias)
    assert called == ["invariant_linear", "invariant_attention", "operator's product"]
    with torch.no_grad():
        torch.testing.assert_close(product, layer(x))
        torch.testing.assert_close(attended, F.scaled_dot_product_attention(heads, heads, heads, mask, scale=0.5))
    assert len(called) == 3


def test_the_mode_is_the_threads_and_ends() -> None:
    seen = []
    with batch_invariant(), batch_invariant():
        other = threading.Thread(target=lambda: seen.append(is_batch_invariant()))
        other.start()
        other.join()
        assert is_batch_invariant()
    with pytest.raises(KeyError), batch_invariant():
        raise KeyError
    assert seen == [False]
    assert not is_batch_invariant()


def test_operators_are_well_registered() -> None:
    query, key = normal(1, 2, 4, 5, 8), normal(2, 2, 2, 7, 8)
    mask = torch.ones(5, 7, dtype=torch.bool)
    torch.library.opcheck(invariant_attention.invariant_attention_operator, (query, key, key, mask, 0.3))
    torch.library.opcheck(invariant_linear.invariant_linear_operator, (normal(1, 5, 8), normal(2, 6, 8), normal(3, 6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "takes a mask"),
        ({"dropout_p": 0.1}, "takes a mask"),
        ({"attn_mask": torch.zeros(5, 5)}, "must be bool"),
        ({"key": torch.zeros(1, 2, 5, 4)}, "must be"),
        ({"key": torch.zeros(1, 1, 5, 8), "value": torch.zeros(1, 1, 5, 8)}, "heads of queries"),
    ],
)
def test_attention_that_it_does_not_know(change: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        invariant_attention.invariant_attention(**{"query": x, "key": x, "value": x} | change)


def test_products_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\[C, 3\]"):
        invariant_linear.invariant_linear(torch.zeros(2, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"bias must be .* \[4\]"):
        invariant_linear.invariant_linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(5))


# On a GPU: the bits themselves.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("depth", "columns"), [(768, 2304), (192, 576), (100, 50)])
def test_products_of_rows_alone(dtype: torch.dtype, depth: int, columns: int) -> None:
    x = normal(1, 5000, depth).to("cuda", dtype)
    weight, bias = normal(2, columns, depth).to("cuda", dtype), normal(3, columns).to("cuda", dtype)
    angle = normal(4, 5000, 32).cuda()

    def products(rows: slice) -> list[Tensor]:
        own = x[rows].contiguous()
        cos, sin = angle.cos(), angle.sin()
        with batch_invariant():
            done = [invariant_linear.invariant_linear(own, weight, bias), linear.linear_gelu(own, weight, bias)]
            if columns % 64 == 0:
                done += [linear.linear_rotary(own, weight, cos, sin, heads=4, length=500)]
                stream = torch.ones(len(own), columns, device="cuda", dtype=dtype)
                linear.linear_residual(stream, own, weight, bias, bias)
                done += [stream]
            if depth % 256 == columns % 256 == 0 and dtype != torch.float32:  # norms can be left to products
                stream = own.clone()
                sums = linear.sums_of_stream(stream)
                linear.linear_residual(stream, own, weight[:depth], None, bias[:depth], sums=sums)
                done += [stream, linear.linear_gelu(stream, weight, bias, sums=sums)]
                done += [linear.linear_rotary(stream, weight, cos, sin, heads=4, length=500, sums=sums)]
        return done

    together = products(slice(0, 5000))
    want = F.linear(x.double(), weight.double(), bias.double())
    assert (together[0].double() - want).abs().max() < 2 ** (-8 if dtype != torch.float32 else -14) * want.abs().max()
    for first, last in ((0, 1), (500, 516), (1000, 2024), (1500, 4500), (3000, 4500), (4500, 4501)):
        for alone, all_of_them in zip(products(slice(first, last)), together, strict=True):
            assert torch.equal(alone, all_of_them[first:last])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_texts_alone(dtype: torch.dtype, head_dim: int) -> None:
    query, key, value = (normal(seed, 5, 4, 700, head_dim).to("cuda", dtype) for seed in (1, 2, 3))
    own = torch.tensor([700, 3, 129, 640, 64])
    mask = (torch.arange(700) < own[:, None])[:, None, None].cuda()
    attend = invariant_attention.invariant_attention
    together = attend(query, key, value, mask)
    want = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask)
    assert (together.double() - want).abs().max() < (0.02 if dtype == HALF else 1e-4)
    for number, length in enumerate(own.tolist()):
        parts = [x[number : number + 1, :, :length].contiguous() for x in (query, key, value)]
        assert torch.equal(attend(*parts)[0], together[number, :, :length])
        assert torch.equal(attend(parts[0][:, :, -2:], *parts[1:])[0], together[number, :, length - 2 : length])


@pytest.mark.gpu
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_statistics_of_rows_alone(temperature: float, filters: dict[str, Any]) -> None:
    from mdkern.kernels import vocab_projection

    weight, hidden = normal(1, 50_304, 256).to("cuda", HALF) / 4, normal(2, 3000, 256).to("cuda", HALF)
    keys = torch.stack((torch.arange(3000), torch.arange(3000) % 7, torch.arange(3000) % 5), 1).cuda()
    bias = normal(3, 50_304).cuda()

    def statistics(rows: slice) -> Any:
        number = torch.arange(3000, device="cuda")[rows]
        heat = torch.full((len(number),), temperature, device="cuda")
        with batch_invariant():
            return vocab_projection(
                hidden, weight, bias, number, heat, torch.tensor(5, device="cuda"), keys[rows], want_top=True,
                want_entropy=True, **filters,
            )  # fmt: skip

    together = statistics(slice(0, 3000))
    for rows in (slice(0, 1), slice(100, 116), slice(2000, 2300), slice(2999, 3000)):
        for alone, all_of_them in zip(statistics(rows), together):
            assert alone is None or torch.equal(alone, all_of_them[rows])
