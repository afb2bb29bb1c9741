"""`divergence` against float64, its bounds, and ids that neither head can produce."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdkern.kernels import divergence
from mdkern.kernels.head import reference
from mdkern.kernels.head.divergence import _divergence
from tests.problems.projection import FLOAT8_CHECKS, in_float8


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


def test_divergence_from_a_weight_in_float8_is_that_of_float64() -> None:
    """The first head as it is and rounded: small numbers, which sums of differences keep."""
    hidden, weight, *_, rows = heads(bias=False)
    rounded, scale = in_float8(weight)
    got = divergence(hidden, weight, None, hidden, rounded, None, rows, other_weight_scale=scale)
    log_p = (hidden[rows].double() @ weight.double().T).log_softmax(-1)
    log_q = (hidden[rows].double() @ (rounded.double() * scale.double()[:, None]).T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert 1e-5 < kl.mean() < 1e-2
    torch.testing.assert_close(got.kl.double(), kl, rtol=1e-3, atol=1e-7)
    back = divergence(hidden, rounded, None, hidden, weight, None, rows, weight_scale=scale)
    torch.testing.assert_close(back.kl.double(), (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-3, atol=1e-7)


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


def test_arguments_that_do_not_fit_are_refused() -> None:
    hidden, weight, bias, *_, rows = heads()
    for row in (-1, 30):
        with pytest.raises(ValueError, match=f"row_index must lie in 0..29, rows of hidden, not {row}"):
            divergence(hidden, weight, bias, hidden, weight, bias, torch.tensor([0, row]))
    with pytest.raises(ValueError, match="other_bias must be float32"):
        divergence(hidden, weight, bias, hidden, weight, bias.double(), rows)
    with pytest.raises(ValueError, match="as many rows as hidden"):
        divergence(hidden, weight, bias, hidden[:5], weight, bias, rows)


def test_the_operator_is_well_registered() -> None:
    p, q = heads()[:3], heads()[3:6]
    torch.library.opcheck(_divergence, (*p, 1.0, 0.0, None, *q, 1.0, 0.0, None, heads()[-1]))
    weight, scale = in_float8(q[1])
    eight = *p, 1.0, 0.0, None, q[0], weight, q[2], 1.0, 0.0, scale, heads()[-1]
    torch.library.opcheck(_divergence, eight, test_utils=FLOAT8_CHECKS)


# On a GPU.


def heads_on_gpu(rows: int, columns: int, dtype: torch.dtype, biased: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows)
    parts: list[Any] = []
    for depth in (256, 136):
        hidden, weight = (torch.randn(n, depth, generator=generator) for n in (rows + 7, columns))
        bias = torch.randn(columns, generator=generator).cuda() if biased else None
        if bias is not None:
            bias[[3, columns - 1]] = -torch.inf
        parts += [hidden.to(dtype).cuda(), (weight * 2 / depth**0.5).to(dtype).cuda(), bias]
    return *parts, torch.randperm(rows + 7, generator=generator)[:rows].cuda()


def exact(arguments: tuple[Any, ...], half: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and cross-entropy from float64 logits, or from those that PyTorch's product rounds to the heads' dtype."""
    log_p, log_q = (
        (
            torch.nn.functional.linear(hidden[arguments[-1]], weight).float()
            if half
            else hidden[arguments[-1]].double() @ weight.double().T
        )
        .add(0.0 if bias is None else bias)
        .log_softmax(-1)
        for hidden, weight, bias in (arguments[:3], arguments[3:6])
    )
    p = log_p.exp()
    kl = (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)
    return kl, -(p * log_q.masked_fill(p == 0, 0.0)).sum(-1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "biased"),
    [
        (1, 50_257, torch.bfloat16, False),
        (16, 50_258, torch.bfloat16, True),
        (300, 4_095, torch.float16, True),
        (1000, 50_258, torch.bfloat16, False),
    ],
)
def test_gpu_errors_are_within_twice_those_of_pytorch(
    rows: int, columns: int, dtype: torch.dtype, biased: bool
) -> None:
    arguments = heads_on_gpu(rows, columns, dtype, biased)
    for value, truth, theirs in zip(divergence(*arguments), exact(arguments), exact(arguments, half=True)):
        assert (value - truth).abs().max() <= 2 * (theirs - truth).abs().max()


@pytest.mark.gpu
def test_gpu_agrees_with_pytorch_in_float32_and_on_rows_that_are_hard() -> None:
    arguments = heads_on_gpu(60, 3000, torch.float32, True)
    torch.testing.assert_close(divergence(*arguments).kl.double(), exact(arguments)[0], rtol=2e-5, atol=2e-5)
    generator = torch.Generator().manual_seed(5)
    p, q = (torch.randn(8, 5000, generator=generator) for _ in range(2))
    p[0, 5], q[1, 5], p[2, 7], q[3, 7] = torch.nan, torch.nan, torch.inf, torch.inf
    p[4], q[5] = -torch.inf, -torch.inf
    p[6, 1:], q[6, 1:], q[7, 9] = -torch.inf, -torch.inf, -torch.inf
    rows = torch.arange(8)
    got = divergence(p.cuda(), None, None, q.cuda(), None, None, rows.cuda())
    for value, want in zip(got, divergence(p, None, None, q, None, None, rows)):
        torch.testing.assert_close(value.cpu(), want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.gpu
def test_gpu_memory_has_no_logits() -> None:
    arguments = heads_on_gpu(2048, 50_258, torch.bfloat16, False)
    divergence(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    divergence(*arguments)
    assert torch.cuda.max_memory_allocated() - before < 8 << 20
