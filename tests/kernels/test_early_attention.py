"""Attention of a few texts: by its definition, where its kernel runs, and that it is as exact as PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone import early_attention as module
from mdkern.kernels.backbone.early_attention import early_attention, early_attention_operator, runs_early
from mdkern.kernels.invariant import batch_invariant
from tests.problems.backbone import normal


def heads(batch: int, length: int, number: int = 2, **options: object) -> list[Tensor]:
    """Queries, keys and values, columns of one matrix."""
    return list(normal(length, batch, length, 3, number, 64, **options).unbind(2))  # type: ignore[arg-type]


def test_it_is_the_definition() -> None:
    query, key, value = heads(2, 5)
    got = early_attention(query[:, 2:4], key, value)
    logits = torch.einsum("bqhd,bkhd->bhqk", query[:, 2:4].double(), key.double()) / 8
    want = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous()


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_hopper", lambda _: True)
    monkeypatch.setattr(module, "num_sms", lambda _: 10)  # 30 tiles of 64 queries

    def runs(batch: int, length: int, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> bool:
        query, key, _ = torch.empty(batch, length, 3, 2, head_dim, dtype=dtype).unbind(2)
        return runs_early(query, key)

    assert runs(15, 64)
    assert not runs(16, 64)
    assert not runs(15, 65)
    assert not runs(1, 63)
    assert not runs(15, 64, head_dim=128)
    assert not runs(15, 64, dtype=torch.float32)
    with batch_invariant():
        assert not runs(15, 64)
    monkeypatch.setattr(module, "is_hopper", lambda _: False)
    assert not runs(15, 64)


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = heads(2, 5)
    for match, arguments in (
        ("query must be", (query[..., :32], key, value)),
        ("key", (query, key[:1], value)),
        ("key", (query, key.double(), value)),
        ("strides", (query, key, value.contiguous())),
        ("value", (query, key, value[:, 1:])),
    ):
        with pytest.raises(ValueError, match=match):
            early_attention(*arguments)


def test_the_operator_is_well_registered() -> None:
    torch.library.opcheck(early_attention_operator, tuple(heads(2, 5)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "length", "number"), [(1, 1024, 12), (16, 256, 3), (3, 301, 4)])
def test_gpu_attention_is_as_exact_as_pytorchs(dtype: torch.dtype, batch: int, length: int, number: int) -> None:
    query, key, value = heads(batch, length, number, dtype=dtype, device="cuda")
    want = early_attention(query.double(), key.double().contiguous(), value.double().contiguous())
    theirs = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value))).transpose(1, 2)
    assert float((early_attention(query, key, value) - want).norm()) < 1.2 * float((theirs - want).norm())
