"""Operators of no rows: they give as many, of the right shapes, and launch nothing that fails."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mdkern.kernels import compact, divergence, select, soft_embedding, vocab_projection
from mdkern.kernels.backbone.combine import combine
from mdkern.kernels.backbone.experts import gated_experts, listed_experts, places_of
from mdkern.kernels.backbone.invariant_attention import invariant_attention
from mdkern.kernels.backbone.invariant_linear import invariant_linear
from mdkern.kernels.backbone.joint import joint_linear, joint_parts, joint_swiglu
from mdkern.kernels.backbone.place_heads import place_heads
from mdkern.kernels.backbone.quantise import quantise_columns, quantise_rows, quantised_norm
from mdkern.kernels.backbone.rms_norm import gathered_rms_norm, rms_norm, scaled_rms_norm
from mdkern.kernels.backbone.rotary import rotary
from mdkern.kernels.backbone.route_experts import Routing, route_experts
from mdkern.kernels.backbone.sandwich import choose_experts, sandwich_norm
from mdkern.kernels.backbone.scaled_linear import Scaled, scaled_linear
from mdkern.kernels.backbone.skinny import skinny_parts
from mdkern.kernels.backbone.swiglu import scaled_swiglu, swiglu
from mdkern.kernels.backbone.window_attention import window_attention

D, F, V, E, K = 64, 32, 96, 4, 2
HALF = torch.bfloat16


class Maker:
    """Tensors on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def x(self, *shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
        return torch.ones(shape, device=self.device).to(dtype)

    def f(self, *shape: int) -> torch.Tensor:
        return self.x(*shape, dtype=torch.float32)

    def i(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def experts(self) -> tuple[list[torch.Tensor], ...]:
        return tuple([self.x(*shape) for _ in range(E)] for shape in ((F, D), (F, D), (D, F)))

    def e4m3(self, *shape: int) -> Scaled:
        return Scaled(self.x(*shape, dtype=torch.float8_e4m3fn), self.f(shape[0]))


def projection(m: Maker, **options: Any) -> Any:
    rows = {"row_index": m.i(0), "temperature": m.f(0), "seed": m.i(), "keys": m.i(0, 3)}
    return vocab_projection(m.x(5, D), m.x(V, D), m.f(V), **rows, **options)


CASES: dict[str, tuple[Callable[[Maker], Any], list[tuple[int, ...]]]] = {
    "projection": (projection, [(0,)] * 3),
    "projection, filtered": (lambda m: projection(m, top_k=3, top_p=0.5), [(0,)] * 3),
    "projection, entropy": (lambda m: projection(m, want_entropy=True, of="sampler"), [(0,)] * 4),
    "soft": (lambda m: soft_embedding(m.x(0, D), m.x(V, D), m.f(V), m.f(0), m.f(0)), [(0, D)]),
    "divergence": (
        lambda m: divergence(m.x(5, D), m.x(V, D), None, m.x(5, D), m.x(V, D), None, m.i(0)),
        [(0,)] * 2,
    ),
    "compact": (lambda m: compact(m.x(0, 5, dtype=torch.bool)), [(0,), ()]),
    "select, no sequences": (
        lambda m: select(m.f(0, 9), m.x(0, 9, dtype=torch.bool), m.i(0, 9), m.i(0, 9), "threshold", bound=0.5),
        [(0, 9)],
    ),
    "select, no positions": (
        lambda m: select(m.f(3, 0), m.x(3, 0, dtype=torch.bool), m.i(3, 0), m.i(3, 0), "top_k", quota=m.i(3)),
        [(3, 0)],
    ),
    "linear": (lambda m: invariant_linear(m.x(0, D), m.x(V, D)), [(0, V)]),
    "attention, no texts": (lambda m: invariant_attention(*[m.x(0, 2, 5, 16)] * 3), [(0, 2, 5, 16)]),
    "attention, no queries": (
        lambda m: invariant_attention(m.x(1, 2, 0, 16), *[m.x(1, 2, 5, 16)] * 2),
        [(1, 2, 0, 16)],
    ),
    "norm": (lambda m: rms_norm(m.x(0, D), m.x(D), 1e-6, update=m.x(0, D)), [(0, D)]),
    "norm in e4m3": (lambda m: scaled_rms_norm(m.x(0, D), m.x(D), 1e-6), [(0, D), (0,)]),
    "gathered norm": (lambda m: gathered_rms_norm(m.x(5, D), m.i(0), m.x(D), 1e-6), [(0, D)] * 2),
    "rotary": (lambda m: rotary(m.x(0, 3, 16), m.f(8, 8), m.f(8, 8), length=4), []),
    "heads": (lambda m: place_heads(m.f(8, 8), m.f(8, 8), m.x(0, 2, 16), m.x(0, 2, 16), length=4), []),
    "window": (
        lambda m: window_attention(
            m.f(8, 8),
            m.f(8, 8),
            *[m.x(0, 2, 16)] * 3,
            columns=m.i(0),
            kept=m.x(2, 0, 9, 2, 16),
            arrived=m.i(0).int(),
        ),
        [(0, 32)],
    ),
    "routing": (lambda m: route_experts(m.f(1, 0, E), None, Routing(K)), [(0, K)] * 2),
    "choosing": (lambda m: choose_experts(m.x(0, E), m.x(E), K), [(0, K)] * 2),
    "experts": (
        lambda m: gated_experts(m.x(0, D), m.i(0, K), m.f(0, K), m.x(E, 2 * F, D), m.x(E, D, F)),
        [(0, D)],
    ),
    "no experts of a row": (
        lambda m: gated_experts(m.x(3, D), m.i(3, 0), m.f(3, 0), m.x(E, 2 * F, D), m.x(E, D, F)),
        [(3, D)],
    ),
    "listed experts": (
        lambda m: listed_experts(m.x(0, D), m.i(0, K), m.f(0, K), *(lists := m.experts()), places_of(*lists)),
        [(0, D)],
    ),
    "combine": (lambda m: combine(m.x(0, D), m.i(0, K), m.f(0, K)), [(0, D)]),
    "sandwich": (
        lambda m: sandwich_norm(m.x(0, D), m.x(0, D), m.x(D), after=[m.x(D)] * 2, eps=1e-6),
        [(0, D)] * 3,
    ),
    "products": (lambda m: joint_linear(m.x(0, 1024), (m.x(128, 1024), None)), [(0, 128)]),
    "gated product": (lambda m: joint_swiglu(m.x(0, 1024), *[(m.x(128, 1024), None)] * 2), [(0, 128)]),
    "product in parts": (lambda m: skinny_parts(m.x(0, 1024), m.x(128, 1024)), [(4, 0, 128)]),
    "product of more rows in parts": (lambda m: joint_parts(m.x(0, 1024), m.x(128, 1024)), [(4, 0, 128)]),
    "activation": (lambda m: swiglu(m.x(0, D), m.x(0, D)), [(0, D)]),
    "activation in e4m3": (lambda m: scaled_swiglu(m.x(0, D), m.x(0, D)), [(0, D), (0,)]),
    "product in e4m3": (lambda m: scaled_linear(m.e4m3(0, D), m.e4m3(V, D), dtype=HALF), [(0, V)]),
    "rounding of rows": (lambda m: quantise_rows(m.x(0, D)), [(0, D), (0,)]),
    "rounding of columns": (lambda m: quantise_columns(m.x(0, D), m.f(D)), [(0, D)]),
    "rounded norm": (lambda m: quantised_norm(m.x(0, D)), [(0, D)]),
}


def shapes(outcome: Any) -> list[tuple[int, ...]]:
    """Of all tensors."""
    if isinstance(outcome, torch.Tensor):
        return [tuple(outcome.shape)]
    return [shape for part in outcome for shape in shapes(part)] if isinstance(outcome, tuple | list) else []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES)
def test_of_no_rows_there_is_no_result(case: str, device: str) -> None:
    run, want = CASES[case]
    assert shapes(run(Maker(device))) == want
    if device == "cuda":
        torch.cuda.synchronize()
