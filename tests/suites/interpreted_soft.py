"""The kernel of `soft_embedding` in Triton's interpreter: run by the tests in a process with TRITON_INTERPRET=1."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton

from mdkern.kernels.head import launch_soft, reference
from mdkern.kernels.head.arguments import Head
from tests.problems.soft import SoftProblem
from tests.suites.interpreter import mend_interpreter

__all__ = ["mend_interpreter"]
assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "rows": 37},
        {"biased": True, "options": {"soft_cap": 3.0, "scale": 0.5}},
        {"from_logits": True},
        {"dtype": torch.float16},
        {"float8": True, "biased": True},
    ],
    ids=str,
)
def test_it_is_the_references(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one chunk for all ids, and with several, whose last one is smaller."""
    monkeypatch.setattr(launch_soft, "UNIT", 16)
    monkeypatch.setattr(launch_soft, "num_sms", lambda _: 2)  # two parts
    problem = SoftProblem(**changes)
    want = reference.soft_embedding(*problem.arguments())
    close = 2e-3 if problem.dtype == torch.float16 else 2e-5
    for chunk in (1 << 20, 40 * problem.rows):
        got = launch_soft.soft_embedding(*problem.arguments(), chunk_elements=chunk)
        torch.testing.assert_close(got, want, rtol=close, atol=close)


def test_small_probabilities_are_kept_in_float16() -> None:
    """Ids of probability 2^-25 each, which float16 would round to 0, carry half of the mass."""
    ids = 1 << 12
    logits = torch.full((1, ids), -25.0 * 0.6931471805599453, dtype=torch.float16)
    table = torch.full((ids, 8), 32.0, dtype=torch.float16)
    arguments = logits, Head(None, None, 1.0, 0.0), table, torch.zeros(1), None, 1.0
    got = launch_soft.soft_embedding(*arguments)
    want = 32.0 * float(logits[0, 0].float().exp()) * ids
    torch.testing.assert_close(got.float(), torch.full((1, 8), want), rtol=2e-3, atol=0.0)


def test_bad_rows_touch_no_other() -> None:
    problem = SoftProblem()
    want = launch_soft.soft_embedding(*problem.arguments())
    problem.logsumexp[2] = torch.nan
    got = launch_soft.soft_embedding(*problem.arguments())
    assert got[2].isnan().all()
    kept = torch.arange(problem.rows) != 2
    assert torch.equal(got[kept], want[kept])
