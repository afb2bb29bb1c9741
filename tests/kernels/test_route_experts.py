"""`route_experts` against the rules of published models, what it refuses, and its kernel on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone.route_experts import Routing, route_experts, route_experts_operator
from tests.problems.experts import routing_problem


def by_hand(products: Tensor, bias: Tensor | None, routing: Routing) -> tuple[list[list[float]], list[list[int]]]:
    """One row at a time, in plain Python."""
    outcome: tuple[list[list[float]], list[list[int]]] = [], []
    for row in products.double().sum(0).tolist():
        total = sum(math.exp(x) for x in row)
        scores = [math.exp(x) / total if routing.softmax else 1 / (1 + math.exp(-x)) for x in row]
        ranked = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist())]
        size = len(row) // routing.groups
        groups = [sorted(ranked[g * size : (g + 1) * size])[-2:] for g in range(routing.groups)]
        best = sorted(range(routing.groups), key=lambda g: -sum(groups[g]))[: routing.kept_groups]
        allowed = [e for e in range(len(row)) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -ranked[e])[: routing.chosen]
        weights = [(ranked if routing.bias_counts else scores)[e] for e in chosen]
        weights = [routing.factor * w / (sum(weights) if routing.normalised else 1.0) for w in weights]
        outcome[0].append(weights + [1.0] * routing.always)
        outcome[1].append(chosen + [len(row) + n for n in range(routing.always)])
    return outcome


ROUTINGS = {
    "Qwen 3": (False, Routing(3)),
    "LLaDA-MoE": (False, Routing(3, normalised=False)),
    "LLaDA-MoE with a bias": (True, Routing(3, normalised=False, bias_counts=True)),
    "LLaDA 2": (True, Routing(4, softmax=False, groups=4, kept_groups=2, factor=2.5, always=1)),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("parts", [1, 3])
def test_experts_and_weights_by_hand(name: str, parts: int) -> None:
    biased, routing = ROUTINGS[name]
    given = routing_problem(6, 12, biased, parts)
    weights, index = route_experts(*given, routing)
    want, chosen = by_hand(*given, routing)
    assert index.tolist() == chosen
    torch.testing.assert_close(weights, torch.tensor(want, dtype=torch.float32))
    torch.library.opcheck(route_experts_operator, (*given, *routing))


def test_what_does_not_fit_is_refused() -> None:
    products, bias = routing_problem(4, 6, True)
    for arguments, message in (
        ((products[0], bias, Routing(2)), "products must be"),
        ((products, bias[:5], Routing(2)), "bias must be"),  # type: ignore[index]
        ((products, None, Routing(7)), "1..6 experts, not 7"),
        ((products, None, Routing(3, groups=3, kept_groups=1)), "1..2 experts, not 3"),
        ((products, None, Routing(2, groups=4)), "4 groups of which 1"),
        ((products, None, Routing(2, groups=3, kept_groups=4)), "3 groups of which 4"),
    ):
        with pytest.raises(ValueError, match=message):
            route_experts(*arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_routes_by_hand(name: str, dtype: torch.dtype) -> None:
    biased, routing = ROUTINGS[name]
    given = routing_problem(33, 128, biased, 4, dtype, "cuda")
    weights, index = route_experts(*given, routing)
    want, chosen = by_hand(given[0].cpu(), None if given[1] is None else given[1].cpu(), routing)
    assert index.tolist() == chosen
    torch.testing.assert_close(weights.cpu(), torch.tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-6)
