"""`gated_experts` against float64, what it refuses, and its kernels on a GPU, eagerly and captured."""

# mypy: ignore-errors

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone.experts import gated_experts, gated_experts_operator
from tests.problems.experts import experts_problem


def exact(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One row and expert at a time, in float64."""
    x, gate_up, down = (tensor.double().cpu() for tensor in (x, gate_up, down))
    width, out = down.shape[2], torch.zeros_like(x)
    for row, (chosen, shares) in enumerate(zip(index.tolist(), weights.tolist())):
        for expert, share in zip(chosen, shares):
            gate, up = gate_up[expert, :width] @ x[row], gate_up[expert, width:] @ x[row]
            curved = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)))
            out[row] += share * (down[expert] @ (curved * up))
    return out


def test_it_is_the_weighted_sum_of_gated_mlps() -> None:
    given = experts_problem(9, 2, 5, 24, 16)
    torch.testing.assert_close(gated_experts(*given).double(), exact(*given), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(gated_experts_operator, given)


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
    got = gated_experts(*given)
    assert float((got.double().cpu() - want).abs().max()) < bound
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = gated_experts(*given)
    given[0].neg_()
    graph.replay()
    assert torch.equal(replayed, gated_experts(*given))
