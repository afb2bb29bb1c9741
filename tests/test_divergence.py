"""`divergence` against float64, its bounds, and ids that neither head can produce."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdkern.kernels import divergence, reference
from mdkern.kernels.divergence import _divergence


def heads(bias: bool = True) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(2)
    parts: list[Any] = []
    for depth in (24, 40):
        parts += [torch.randn(30, depth, generator=generator), torch.randn(500, depth, generator=generator) * 0.3]
        parts.append(torch.randn(500, generator=generator) if bias else None)
        if bias:
            parts[-1][[3, 499]] = -torch.inf
    return *parts, torch.randperm(30, generator=generator)[:17]


def test_divergence_is_that_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 2500)  # five rows at a time
    hidden, weight, bias, other_hidden, other_weight, other_bias, rows = heads()
    got = divergence(*heads(), scale=0.5, other_soft_cap=3.0)
    p = (0.5 * hidden[rows].double() @ weight.double().T + bias).softmax(-1)
    other = 3.0 * torch.tanh(other_hidden[rows].double() @ other_weight.double().T / 3.0)
    q = (other + other_bias).softmax(-1)
    possible = p > 0
    log_ratio = torch.where(possible, p.log() - q.log(), 0.0)
    torch.testing.assert_close(got.kl.double(), (p * log_ratio).sum(-1), rtol=1e-5, atol=1e-5)
    entropy = -(p * torch.where(possible, p.log(), 0.0)).sum(-1)
    torch.testing.assert_close(got.cross_entropy.double(), (p * log_ratio).sum(-1) + entropy, rtol=1e-5, atol=1e-5)


def test_divergence_is_zero_from_itself_alone() -> None:
    hidden, weight, bias, *_, rows = heads()
    assert divergence(hidden, weight, bias, hidden, weight, bias, rows).kl.abs().max() < 1e-6
    assert divergence(*heads()).kl.min() > 0.01


def test_divergence_is_infinite_where_q_excludes_what_p_allows() -> None:
    hidden, weight, bias, *_, rows = heads()
    assert divergence(hidden, weight, None, hidden, weight, bias, rows).kl.isinf().all()


def test_vocabularies_must_be_the_same() -> None:
    hidden, weight, bias, *_, rows = heads()
    with pytest.raises(ValueError, match="500 and 499"):
        divergence(hidden, weight, bias, hidden, weight[:-1], None, rows)


def test_the_operator_is_well_registered() -> None:
    p, q = heads()[:3], heads()[3:6]
    torch.library.opcheck(_divergence, (*p, 1.0, 0.0, *q, 1.0, 0.0, heads()[-1]))
