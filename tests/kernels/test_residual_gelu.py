"""From attention's result to hidden units in one launch: by definition, where it runs, as exact as apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone import linear
from mdkern.kernels.backbone.residual_gelu import residual_gelu, residual_gelu_operator, runs_at_once
from mdkern.kernels.invariant import batch_invariant
from tests.problems.backbone import normal


def arguments(rows: int, width: int, units: int) -> list[Tensor]:
    """Stream, attention's result, projection, gate, folded weight and bias."""
    up = normal(4, units, width) * width**-0.5
    return [
        normal(1, rows, width) + 0.5,
        normal(2, rows, width),
        normal(3, width, width) * width**-0.5,
        normal(5, width),
        up - up.mean(1, keepdim=True),
        normal(6, units),
    ]


def by_definition(stream: Tensor, x: Tensor, weight: Tensor, gate: Tensor, up: Tensor, bias: Tensor) -> list[Tensor]:
    updated = stream + gate * (x @ weight.T)
    return [updated, F.gelu(F.layer_norm(updated, updated.shape[1:]) @ up.T + bias, approximate="tanh")]


def test_it_is_the_definition() -> None:
    given = arguments(12, 64, 128)
    kept = given[0].clone()
    for got, want in zip(residual_gelu(*given), by_definition(*(tensor.double() for tensor in given))):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(given[0], kept)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_hopper", lambda _: True)

    def runs(rows: int = 1024, width: int = 192, units: int = 768, gates: int = 0) -> bool:
        stream, weight, up = (torch.empty(size, width, dtype=torch.bfloat16) for size in (rows, width, units))
        return runs_at_once(stream, weight, torch.empty(*([gates] if gates else []), width), up)

    assert runs()
    assert runs(rows=linear.MIDDLE_ROWS, width=256)
    assert not runs(rows=linear.MIDDLE_ROWS - 1)
    assert not runs(width=320)
    assert not runs(width=96)
    assert not runs(units=64)
    assert not runs(gates=2)
    with batch_invariant():
        assert not runs()


def test_what_does_not_fit_is_refused() -> None:
    given = arguments(12, 64, 128)
    for match, place, wrong in (
        ("stream must be", 0, normal(1, 12, 320)),
        ("x must be", 1, given[1][:5]),
        ("contiguous", 2, given[2].T),
        ("gate must be", 3, given[3].double()),
        ("multiple of 128", 4, given[4][:64]),
        ("up_bias", 5, given[5][:64]),
    ):
        with pytest.raises(ValueError, match=match):
            residual_gelu(*given[:place], wrong, *given[place + 1 :])


def test_the_operator_is_well_registered() -> None:
    torch.library.opcheck(residual_gelu_operator, tuple(arguments(12, 64, 128)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(4096, 192), (1000, 256), (513, 64)])
def test_gpu_results_are_as_exact_as_pytorchs(dtype: torch.dtype, rows: int, width: int) -> None:
    given = [tensor.to("cuda", dtype) for tensor in arguments(rows, width, 4 * width)]
    exact = by_definition(*(tensor.double() for tensor in given))
    for got, theirs, want in zip(residual_gelu(*given), by_definition(*given), exact):
        assert float((got - want).norm()) < 1.2 * float((theirs - want).norm())
