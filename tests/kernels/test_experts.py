"""`gated_experts` and `listed_experts` against float64, what they refuse, and their kernels on a GPU."""

# mypy: ignore-errors

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone.experts import (
    gated_experts,
    gated_experts_operator,
    listed_experts,
    listed_experts_operator,
    places_of,
)
from mdkern.kernels.invariant import batch_invariant
from tests.problems.experts import experts_problem, listed


def exact(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str = "gelu") -> Tensor:
    """One row and expert at a time, in float64."""
    x, gate_up, down = (tensor.double().cpu() for tensor in (x, gate_up, down))
    width, out = down.shape[2], torch.zeros_like(x)
    for row, (chosen, shares) in enumerate(zip(index.tolist(), weights.tolist())):
        for expert, share in zip(chosen, shares):
            gate, up = gate_up[expert, :width] @ x[row], gate_up[expert, width:] @ x[row]
            curved = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)))
            curved = gate / (1.0 + torch.exp(-gate)) if activation == "silu" else curved
            out[row] += share * (down[expert] @ (curved * up))
    return out


def test_it_is_the_weighted_sum_of_gated_mlps() -> None:
    given = experts_problem(9, 2, 5, 24, 16)
    torch.testing.assert_close(gated_experts(*given).double(), exact(*given), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(gated_experts_operator, (*given, "silu"))
    torch.testing.assert_close(gated_experts(*given, "silu").double(), exact(*given, "silu"), rtol=1e-5, atol=1e-5)


def test_weights_may_be_tensors_of_their_own() -> None:
    x, index, weights, *stacked = experts_problem(9, 2, 5, 24, 16)
    lists = listed(*stacked)
    want = exact(x, index, weights, *stacked, "silu")
    got = listed_experts(x, index, weights, *lists, places_of(*lists))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(listed_experts_operator, (x, index, weights, *lists, places_of(*lists), "silu"))


def test_where_weights_lie() -> None:
    """In one tensor they lie one after the other."""
    *_, gate_up, down = experts_problem(4, 2, 3, 8, 16)
    gates, ups = gate_up.chunk(2, dim=1)
    places = places_of(gates.unbind(), ups.unbind(), down.unbind())
    assert places.tolist() == [[0, 256, 512], [128, 384, 640], [0, 128, 256]]
    for wrong in (gate_up.mT.unbind(), torch.zeros(65)[1:].view(1, 8, 8).unbind()):
        with pytest.raises(ValueError, match="contiguous, at addresses that are multiples of 16 bytes"):
            places_of(wrong, wrong, wrong)


def test_what_does_not_fit_is_refused() -> None:
    x, index, weights, gate_up, down = experts_problem(4, 2, 3, 8, 16)
    for arguments, message in (
        ((x[0], index, weights, gate_up, down), "x must be"),
        ((x, index[1:], weights, gate_up, down), "index must be"),
        ((x, index.int(), weights, gate_up, down), "index must be"),
        ((x, index, weights.double(), gate_up, down), "weights must be"),
        ((x, index, weights, gate_up[:, 1:], down), "gate_up must be"),
        ((x, index, weights, gate_up, down.double()), "down must be"),
        ((x, index, weights, gate_up, down[0]), "down must be"),
        ((x, index, weights, gate_up.mT.contiguous().mT, down), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_experts(*arguments)
    with pytest.raises(ValueError, match="activation must be one of gelu, silu"):
        gated_experts(x, index, weights, gate_up, down, "relu")
    gates, ups, downs = listed(gate_up, down)
    places = places_of(gates, ups, downs)
    for lists, message in (
        ((gates[1:], ups, downs, places), "as many gates"),
        ((gates, ups, [*downs[1:], downs[0].mT], places), "downs must be"),
        ((gates, [*ups[1:], ups[0].double()], downs, places), "gates must be"),
        ((gates, ups, downs, places[1:]), "places must be"),
    ):
        with pytest.raises(ValueError, match=message):
            listed_experts(x, index, weights, *lists)


ON_GPU = [
    (64, 4, 16, 192, 96, torch.bfloat16),  # few rows of an expert: our kernels
    (300, 2, 5, 200, 72, torch.float16),  # two tiles of rows, shapes that do not divide
    (900, 2, 4, 128, 64, torch.bfloat16),  # many: grouped products
    (40, 2, 4, 72, 40, torch.float32),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_gpu_agrees_with_float64_eagerly_and_captured(case: tuple) -> None:
    given = experts_problem(*case, device="cuda")
    want, dtype = exact(*given), case[-1]
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * float(want.abs().max())
    lists = listed(*given[3:])
    places = places_of(*lists)
    for run in (gated_experts, lambda *given: listed_experts(*given[:3], *lists, places, "gelu")):
        got = run(*given)
        assert float((got.double().cpu() - want).abs().max()) < bound
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            replayed = run(*given)
        given[0].neg_()
        graph.replay()
        assert torch.equal(replayed, run(*given))
        given[0].neg_()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [700, 1501])
def test_gpu_grouped_products_in_parts_give_the_same_bits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mdkern.kernels.backbone import triton_experts

    given = experts_problem(rows, 3, 4, 1280, 704, torch.bfloat16, device="cuda")
    whole = gated_experts(*given)
    monkeypatch.setattr(triton_experts, "MOST_GATHERED", 1 << 20)
    monkeypatch.setattr(triton_experts, "MOST_OUTPUTS", 1 << 20)
    assert torch.equal(gated_experts(*given), whole)


@pytest.mark.gpu
def test_gpu_bits_of_a_row_do_not_depend_on_others_in_the_batch_invariant_mode() -> None:
    x, index, weights, *stacked = experts_problem(300, 2, 5, 256, 128, torch.bfloat16, device="cuda")
    lists = listed(*stacked)
    places = places_of(*lists)
    with batch_invariant():
        for run in (
            lambda *given: gated_experts(*given, *stacked, "silu"),
            lambda *given: listed_experts(*given, *lists, places),
        ):
            few = run(x[7:9].contiguous(), index[7:9].contiguous(), weights[7:9].contiguous())
            assert torch.equal(few, run(x, index, weights)[7:9])
