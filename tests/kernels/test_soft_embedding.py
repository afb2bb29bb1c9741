"""`soft_embedding` against float64; its kernel in the interpreter, compiled, and on a GPU; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mdkern.kernels import soft_embedding, vocab_projection
from mdkern.kernels.head import reference
from mdkern.kernels.head.soft_embedding import _soft_embedding
from tests.own_process import run_in_the_interpreter
from tests.problems.projection import FLOAT8_CHECKS
from tests.problems.soft import SoftProblem


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_the_interpreter("tests/suites/interpreted_soft.py")


def test_the_kernel_compiles_for_every_gpu() -> None:
    pytest.importorskip("triton")
    from tests.suites import compiled_soft

    compiled_soft.main()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True},
        {"options": {"soft_cap": 3.0, "scale": 0.5}},
        {"from_logits": True},
        {"biased": True},
        {"float8": True},
    ],
    ids=str,
)
def test_it_is_that_of_float64(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 700)  # some 50 ids at a time
    problem = SoftProblem(**changes)
    torch.testing.assert_close(problem.run().double(), problem.exact(), rtol=1e-5, atol=1e-5)


def test_the_logsumexp_is_that_of_the_projection() -> None:
    """The two operators fit together: probabilities that sum to 1 reproduce a table of ones."""
    problem = SoftProblem(options={"soft_cap": 3.0})
    rows = torch.arange(len(problem.hidden))
    seed, keys = torch.tensor(1), torch.zeros(len(rows), 3, dtype=torch.int64)
    given = problem.hidden, problem.weight, None, rows, problem.temperature, seed, keys
    drawn = vocab_projection(*given, soft_cap=3.0, of="sampler")
    ones = torch.ones(problem.weight.shape[0], 2)
    soft = soft_embedding(
        problem.hidden, problem.weight, None, drawn.logsumexp, problem.temperature, ones, soft_cap=3.0
    )
    torch.testing.assert_close(soft, torch.ones(len(rows), 2), rtol=1e-5, atol=1e-5)


def test_errors_are_within_twice_those_of_pytorch_in_bfloat16() -> None:
    problem = SoftProblem(rows=40, columns=900, depth=256, dtype=torch.bfloat16)
    exact = problem.exact()
    logits = problem.logits(torch.float32)
    p = (logits / problem.divisor()).softmax(-1).bfloat16()
    theirs = (p @ problem.table).double()
    assert (problem.run().double() - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_bad_rows_touch_no_other() -> None:
    problem = SoftProblem()
    want = problem.run()
    problem.logsumexp[2] = torch.nan
    got = problem.run()
    assert got[2].isnan().all()
    kept = torch.arange(len(got)) != 2
    assert torch.equal(got[kept], want[kept])


def test_the_operator_is_well_registered() -> None:
    for tied in (False, True):
        torch.library.opcheck(_soft_embedding, SoftProblem(rows=3, columns=70, tied=tied).flat())
    eight = SoftProblem(rows=3, columns=70, float8=True).flat()
    torch.library.opcheck(_soft_embedding, eight, test_utils=FLOAT8_CHECKS)


def test_what_does_not_fit_is_refused() -> None:
    problem = SoftProblem()
    hidden, weight, lse = problem.hidden, problem.weight, problem.logsumexp

    def refused(message: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            soft_embedding(*arguments, **options)

    refused("table must be", hidden, weight, None, lse, 1.0, problem.table[1:])
    refused("table must be", hidden, weight, None, lse, 1.0, problem.table.double())
    refused("table is needed", hidden, None, None, lse, 1.0)
    refused("logsumexp must be", hidden, weight, None, lse[1:], 1.0)
    refused("temperature must be", hidden, weight, None, lse, -1.0)
    refused("temperature must be", hidden, weight, None, lse, problem.temperature.double())
    eight = SoftProblem(float8=True)
    refused("table is needed", hidden, eight.weight, None, lse, 1.0, weight_scale=eight.weight_scale)
    refused("soft_cap", hidden, weight, None, lse, 1.0, soft_cap=-1.0)


# On a GPU.

ON_GPU = [
    {"rows": 256, "columns": 20_000, "depth": 768, "dtype": torch.bfloat16, "tied": True},
    {"rows": 300, "columns": 5_001, "depth": 264, "dtype": torch.bfloat16, "options": {"soft_cap": 5.0}},
    {"rows": 2500, "columns": 4_096, "depth": 128, "dtype": torch.bfloat16},
    {"rows": 40, "columns": 3_000, "depth": 77, "dtype": torch.float16, "biased": True},
    {"rows": 5, "columns": 3_000, "dtype": torch.float32, "from_logits": True},
    {"rows": 300, "columns": 5_001, "depth": 256, "dtype": torch.bfloat16, "float8": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", ON_GPU, ids=lambda changes: "-".join(map(str, changes.values())))
def test_gpu_agrees_with_float64(changes: dict[str, Any]) -> None:
    problem = SoftProblem(device="cuda", **changes)
    exact = problem.exact()
    p = (problem.logits(torch.float32) / problem.divisor()).softmax(-1).to(problem.table.dtype)
    theirs = (p @ problem.table).double()
    error: Tensor = (problem.run().double() - exact).abs().max()
    assert error <= 2 * (theirs - exact).abs().max() + 1e-6
