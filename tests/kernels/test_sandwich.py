"""`sandwich_norm` and `choose_experts`: against their formulas in float64, what they refuse, and on a GPU."""

# mypy: ignore-errors

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdkern.kernels.backbone.sandwich import (
    choose_experts,
    choose_experts_operator,
    sandwich_norm,
    sandwich_norm_operator,
)
from tests.problems.experts import sandwich_problem

NAMES = "second", "second_weight", "outer_weight", "factor", "after", "eps"


def call(given: tuple) -> tuple[Tensor, list[Tensor]]:
    return sandwich_norm(*given[:3], **dict(zip(NAMES, given[3:])))


def exact(given: tuple) -> tuple[Tensor, list[Tensor]]:
    """With PyTorch's norm, in float64."""
    given = [part.double().cpu() if isinstance(part, Tensor) else part for part in given]
    stream, first, first_weight, second, second_weight, outer_weight, factor, after, eps = given

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.double().cpu(), eps)

    update = norm(first, first_weight)
    if second is not None:
        update = factor * norm(update + norm(second, second_weight), outer_weight)
    new = stream * (1.0 if factor is None else factor) + update
    return new, [norm(new, weight) for weight in after]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_sandwich_norms_are_those_of_pytorch(whole: bool, after: int) -> None:
    given = sandwich_problem(4, 17, after, whole)
    before = given[0].clone()
    torch.testing.assert_close(call(given), exact(given), rtol=1e-5, atol=1e-5, check_dtype=False)
    assert torch.equal(given[0], before)
    torch.library.opcheck(sandwich_norm_operator, given)


def test_weights_of_experts_are_a_softmax_over_those_chosen() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0, -1.0], [5.0, -3.0, 4.0, 4.5]])
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weights, index = choose_experts(scores, scales, 2, 0.5)
    assert index.tolist() == [[1, 2], [0, 3]]
    shares = torch.tensor([[0.5, -0.5], [0.25, -0.25]]).mul(0.5).exp()
    shares = shares / shares.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, shares * torch.tensor([[2.0, 3.0], [1.0, 4.0]]))
    torch.library.opcheck(choose_experts_operator, (scores, scales, 2, 0.5))


def test_what_does_not_fit_is_refused() -> None:
    given = sandwich_problem(4, 17, 1, True)
    for place, value, message in (
        (0, given[0][0], "stream must be"),
        (1, given[1][1:], "first must be"),
        (1, given[1].double(), "first must be"),
        (2, given[2][1:], "first_weight must be"),
        (4, None, "second needs"),
        (6, given[0], "factor must be"),
        (7, [given[2]] * 4, "at most 3"),
        (7, [given[2][1:]], "after must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call((*given[:place], value, *given[place + 1 :]))
    scores, scales = torch.zeros(3, 5), torch.ones(5)
    for arguments in ((scores[0], scales, 2), (scores, scales[1:], 2), (scores, scales, 6), (scores, scales, 1, 0.0)):
        with pytest.raises(ValueError, match="must"):
            choose_experts(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_gpu_agrees_with_float64(dtype: torch.dtype, whole: bool) -> None:
    given = sandwich_problem(33, 2816, 3, whole, dtype, "cuda")
    close = 1e-4 if dtype == torch.float32 else 2e-2
    loosely = {"check_dtype": False, "check_device": False}
    torch.testing.assert_close(call(given), exact(given), rtol=close, atol=close, **loosely)
    scores = torch.randn(33, 128, device="cuda").to(dtype)
    weights, index = choose_experts(scores, torch.ones(128, device="cuda"), 8)
    want = scores.float().topk(8).values
    assert torch.equal(scores.float().gather(1, index), want)  # ties may be in any order
    torch.testing.assert_close(weights, want.softmax(-1), rtol=1e-5, atol=1e-6)
