"""Attention of few sequences and of many: where it runs, what it refuses, and that it is as exact as PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone import attention as contract
from mdkern.kernels.backbone.attention import attention, attention_operator, attention_reference, new_arrivals, pays
from mdkern.kernels.invariant import batch_invariant
from tests.problems.backbone import normal

CPU = torch.device("cpu")


def heads(batch: int, length: int, count: int) -> tuple[Tensor, ...]:
    return normal(1, batch, length, 3, count, 64).unbind(2)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "is_hopper", lambda _: True)
    monkeypatch.setattr(contract, "num_sms", lambda _: 132)

    def serves(batch: int, length: int, count: int, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> bool:
        return pays(*torch.empty(batch, length, 3, count, head_dim, dtype=dtype).unbind(2), None)

    batches = (1, 2, 4, 5, 6, 16)
    assert [contract.takes_many(batch, 1024, 12, CPU) for batch in batches] == [False, False, False, True, False, True]
    assert [serves(batch, 1024, 12) for batch in batches] == [True, True, True, True, False, True]
    assert [serves(64, length, 12) for length in (250, 128)] == [True, False], "tiles must be full, too"
    assert serves(16, 256, 3, dtype=torch.float16)
    assert not serves(1, 1024, 12, dtype=torch.float32)
    assert not serves(1, 1024, 12, head_dim=128)
    with batch_invariant():
        assert all(serves(batch, 1024, 12) for batch in batches)
        assert not any(contract.takes_many(batch, 1024, 12, CPU) for batch in batches)
        assert not serves(1, 1024, 12, head_dim=128)
    query, key, value = torch.empty(2, 64, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
    mask = torch.ones(2, 64, dtype=torch.bool)
    some = query[:, :8].contiguous()
    assert pays(query, key, value, None)
    assert not pays(query, key, value, mask)
    assert not pays(some, key, value, None)
    with batch_invariant():
        assert pays(query, key, value, mask)
        assert pays(some, key, value, None)
    assert not pays(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None)
    assert not pays(*(x[:, 1:] for x in (query, key, value)), None), "the sequences do not follow each other"
    monkeypatch.setattr(contract, "is_hopper", lambda _: False)
    assert not pays(query, key, value, None)


def test_two_programs_share_the_keys_of_one_long_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "num_sms", lambda _: 132)
    counts = {(1, 1024, 12): 192, (2, 1024, 12): 0, (1, 1000, 12): 0, (16, 256, 3): 0, (1, 4096, 3): 192}
    assert {shape: len(new_arrivals(*shape, CPU)) for shape in counts} == counts
    with batch_invariant():
        assert not any(len(new_arrivals(*shape, CPU)) for shape in counts)


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = heads(2, 10, 3)
    with pytest.raises(ValueError, match="must be"):
        attention(query, key[:, :9], value, new_arrivals(2, 10, 3, CPU))
    with pytest.raises(ValueError, match="arrived"):
        attention(query, key, value, torch.zeros(5, dtype=torch.int32))
    for mask in (torch.ones(2, 10), torch.ones(3, 10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask"):
            attention(query, key, value, new_arrivals(2, 10, 3, CPU), mask)


def test_reference_is_the_softmax() -> None:
    query, key, value = heads(2, 10, 3)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
    torch.testing.assert_close(attention(query, key, value, new_arrivals(2, 10, 3, CPU)), want)


def test_operator_is_registered_right() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        attention_operator, (*heads(2, 10, 3), torch.zeros(0, dtype=torch.int32), None), test_utils=checks
    )


@pytest.mark.parametrize(("batch", "length", "heads"), [(2, 512, 3), (3, 40, 2), (1, 330, 2)])
def test_many_as_plain_python(batch: int, length: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of a program, more keys than the ring has, tiles that lack queries and keys; maxima that grow."""
    pytest.importorskip("triton")
    from mdkern.kernels.backbone import hopper_attention, launch_attention
    from tests.problems.gluon_on_cpu import OnCpu

    packed = normal(1, batch, length, 3, heads, 64)
    packed[:, :, 1] *= torch.linspace(4, 0.5, length)[:, None, None]  # the last keys come first
    packed[-1, -1, 2] = float("inf")
    query, key, value = packed.bfloat16().unbind(2)
    monkeypatch.setattr(launch_attention, "attention_kernel", OnCpu(hopper_attention.attention_kernel))
    got = launch_attention.attention_of_many(query, key, value)
    value[-1, -1] = 1.0
    got_finite = launch_attention.attention_of_many(query, key, value)
    want = attention_reference(query.double(), key.double(), value.double(), torch.zeros(0), None)
    assert (got_finite - want).norm() <= 2**-8 * want.norm(), "weights and results have 8 bits"
    assert torch.equal(got[:-1], got_finite[:-1]), "infinite values are their sequence's own"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1024, 12), (2, 1024, 12), (16, 256, 3), (3, 200, 2), (1, 1100, 12), (1, 1, 1)])
def test_gpu_is_as_exact_as_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against float64, again and again with the same counters; a sequence's infinite values are its own."""
    query, key, value = (x.to("cuda", dtype).contiguous() for x in heads(*shape))
    packed = torch.stack([query, key, value], 2)
    query, key, value = packed.unbind(2)
    arrived = new_arrivals(*shape, query.device)
    exact = attention_reference(query.double(), key.double(), value.double(), arrived, None)
    plain = attention_reference(query, key, value, arrived, None)
    got = attention(query, key, value, arrived)
    assert (got - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-6
    for _ in range(5):
        assert torch.equal(attention(query, key, value, arrived), got)
    assert not arrived.any()
    if shape[0] > 1:
        value[-1] = float("inf")
        assert torch.equal(attention(query, key, value, arrived)[:-1], got[:-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(16, 1024, 12), (5, 1000, 12), (64, 256, 3), (33, 300, 5), (2, 4097, 3), (3, 2, 2), (1, 64, 1)]
)
def test_gpu_many_are_as_exact_as_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against float64, with scores that grow from tile to tile; the same bits again, whatever other sequences hold.

    A row's largest weight need not be 1 here, so that it is rounded like the others.
    """
    from mdkern.kernels.backbone.launch_attention import attention_of_many

    packed = torch.stack([x.to("cuda") for x in heads(*shape)], 2)
    packed[:, :, 1] *= torch.linspace(3, 0.5, shape[1], device="cuda")[:, None, None]
    query, key, value = packed.to(dtype).unbind(2)
    none = torch.zeros(0, dtype=torch.int32, device="cuda")
    exact = torch.cat([attention_reference(*(x[b : b + 1].double() for x in (query, key, value)), none, None)
                       for b in range(shape[0])])  # fmt: skip
    plain = attention_reference(query, key, value, none, None)
    got = attention_of_many(query, key, value)
    assert (got - exact).norm() <= 1.3 * (plain - exact).norm() + 1e-6
    for _ in range(5):
        assert torch.equal(attention_of_many(query, key, value), got)
    if contract.takes_many(*shape, query.device):
        assert torch.equal(attention(query, key, value, none), got)
    value[-1] = float("inf")
    assert torch.equal(attention_of_many(query, key, value)[:-1], got[:-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 100, 128, 200, 300, 1024])
def test_gpu_bits_in_the_batch_invariant_mode_are_those_of_a_sequence_alone(length: int, dtype: torch.dtype) -> None:
    """Beside others, before padding that it does not see, and for some of its queries."""
    query, key, value = torch.stack([x.to("cuda", dtype) for x in heads(5, 1100, 3)], 2).unbind(2)
    none = torch.zeros(0, dtype=torch.int32, device="cuda")
    seen = (torch.arange(1100, device="cuda") < length).expand(5, -1)
    chosen = torch.tensor(sorted({0, length // 3, length - 1}), device="cuda")
    alone = [x[2:3, :length].contiguous() for x in (query, key, value)]
    exact = attention_reference(*(x.double() for x in alone), none, None)
    plain = attention_reference(*alone, none, None)
    with batch_invariant():
        want = attention(*alone, none)
        assert (want - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-6
        assert torch.equal(attention(query, key, value, none, seen)[2:3, :length], want)
        some = query[:, chosen].contiguous()
        assert torch.equal(attention(some, key, value, none, seen)[2:3], want[:, chosen])
        several = [x[:, :length].contiguous() for x in (query, key, value)]
        assert torch.equal(attention(*several, none)[2:3], want)
