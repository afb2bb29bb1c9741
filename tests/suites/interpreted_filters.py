"""The kernels of the filters and of `divergence` in Triton's interpreter: run in a process with TRITON_INTERPRET=1."""

# mypy: ignore-errors
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.head import launch_divergence, launch_filter, reference, triton_filter_search
from mdkern.kernels.head.arguments import Filters, Head
from mdkern.kernels.head.launch import Tiling
from tests.problems.filters import FILTERS, ROWS, FilterProblem, check_filtered
from tests.problems.projection import in_float8
from tests.suites.interpreter import mend_interpreter  # noqa: F401  a fixture, for every test here

assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"

SEARCH = launch_filter.Search(rows=2, warps=4)


def row_of(kind: str, seed: int) -> Tensor:
    """A row longer than the 384 logits that are collected without a survey before; of those with many equal logits
    one longer than the 1,024 places there are, so that some find none."""
    return ROWS[kind](torch.Generator().manual_seed(seed), 1, 1999 if kind in ("flat", "integers") else 799)


@triton.jit
def threshold_kernel(logits, listed, out, width, low, goal, BY_MASS: tl.constexpr, LANES: tl.constexpr):
    row = logits + tl.program_id(0) * width
    top = tl.full([], -float("inf"), tl.float32)
    for start in range(0, width, 128):
        at = start + tl.arange(0, 128)
        top = tl.maximum(top, tl.max(tl.load(row + at, mask=at < width, other=-float("inf")), 0))
    value, measure, above, _ = triton_filter_search.find_threshold(
        row, listed + tl.program_id(0) * (32 * LANES), width, top, low, float("inf"), goal, 0.0, BY_MASS, 1, LANES
    )
    tl.store(out + tl.program_id(0) * 3, value)
    tl.store(out + tl.program_id(0) * 3 + 1, measure)
    tl.store(out + tl.program_id(0) * 3 + 2, above)


def find(logits: Tensor, goal: float, by_mass: bool, lanes: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold of each row, and the measures of what is at or above it and of what is above it, by the kernel."""
    finite = logits.masked_fill(logits == -torch.inf, -1e30).contiguous()
    out = torch.empty(len(logits), 3)
    scratch = torch.empty(len(logits), 32 * lanes)
    threshold_kernel[(len(logits),)](finite, scratch, out, logits.shape[1], -5e29, goal, BY_MASS=by_mass, LANES=lanes)
    value, kept, above = out.unbind(1)
    return value, kept, above


@pytest.mark.parametrize("kind", ROWS)
def test_threshold_of_a_count_is_the_kth_largest(kind: str) -> None:
    logits = row_of(kind, 1)
    possible = int((logits > -torch.inf).sum(-1).min())
    for k in (1, 300, logits.shape[1] - 1):
        value, kept, above = find(logits, float(k), False)
        want = logits.sort(-1, descending=True).values[:, k - 1]
        if k <= possible:
            assert torch.equal((logits >= value[:, None]), (logits >= want[:, None])), k
            assert torch.equal(kept.long(), (logits >= want[:, None]).sum(-1)), k
            assert torch.equal(above.long(), (logits > want[:, None]).sum(-1)), k
        else:
            assert (value < -1e29).all(), k
            assert torch.equal(kept.long(), (logits > -torch.inf).sum(-1)), k


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("share", [0.6, 0.999])
def test_threshold_of_a_mass_is_the_smallest_set_that_reaches_it(kind: str, share: float) -> None:
    logits = row_of(kind, 2)
    value, *_ = find(logits, share, True)
    probability = logits.double().softmax(-1)
    at_or_above = logits >= value[:, None]
    above = logits > logits.masked_fill(~at_or_above, torch.inf).amin(-1, keepdim=True)
    rounding = 3e-6
    assert ((probability * at_or_above).sum(-1) >= share - rounding).all()
    assert ((probability * above).sum(-1) <= share + rounding).all()


@pytest.mark.parametrize(
    ("kind", "filters"),
    [*(("noise", filters) for filters in FILTERS), *((kind, filters) for kind in ROWS for filters in FILTERS[-1:])],
    ids=str,
)
def test_tokens_are_those_of_the_reference(kind: str, filters: tuple[int, float, float]) -> None:
    problem = FilterProblem(kind, rows=3, columns=1111)
    got = launch_filter.vocab_projection(*problem.arguments(), Filters(*filters), search=SEARCH)
    check_filtered(problem, got, filters)


@pytest.mark.parametrize(
    ("kind", "filters"),
    [
        ("noise", (0, 1.0, 0.0, "reach")),
        ("noise", (90, 0.61, 0.0, "within")),
        ("integers", (90, 0.61, 0.0, "reach")),
        ("integers", (0, 0.57, 0.02, "within")),
        ("flat", (90, 0.61, 0.0, "within")),
        ("two_peaks", (0, 0.57, 0.02, "reach")),
    ],
    ids=str,
)
def test_statistics_of_what_is_drawn_from_are_the_references(kind: str, filters: tuple[Any, ...]) -> None:
    """Rows of temperatures 1, 0 and 0.5; equals are cut."""
    problem = FilterProblem(kind, rows=3, columns=390)
    got = launch_filter.vocab_projection(*problem.arguments("sampler"), Filters(*filters), search=SEARCH)
    check_filtered(problem, got, filters, of="sampler")


def test_the_fewest_of_equals_are_kept() -> None:
    """Tokens of many draws from equal logits: the lowest ids alone, and all of them."""
    for filters, kept in ((Filters(3), 3), (Filters(0, 0.02), 14), (Filters(40, 0.1), 4)):
        problem = FilterProblem("flat", rows=6, columns=700, uniform=1.0)
        problem.row_index = torch.zeros_like(problem.row_index)
        token, _, top1, top2, entropy, *_ = launch_filter.vocab_projection(
            *problem.arguments("sampler"), filters, search=SEARCH
        )
        assert token.max() < kept
        torch.testing.assert_close(top1, torch.full((6,), 1 / kept))
        torch.testing.assert_close(top2, torch.full((6,), 1 / kept))
        torch.testing.assert_close(entropy.exp(), torch.full((6,), float(kept)))
        want = reference.vocab_projection(*problem.arguments(), filters)[0]
        assert torch.equal(token, want)


def test_more_equals_in_a_lane_than_it_has_places() -> None:
    """80 equal logits that all fall to one thread, then a share of their probability."""
    problem = FilterProblem("flat", rows=2, columns=80 * 512, uniform=1.0)
    problem.hidden[:] = -20.0
    problem.hidden[:, ::512] = 1.0
    filters = Filters(74, 0.5)
    got = launch_filter.vocab_projection(*problem.arguments("sampler"), filters, search=SEARCH)
    torch.testing.assert_close(got[4].exp(), torch.full((2,), 37.0))


@pytest.mark.parametrize("of", ["model", "sampler"])
def test_rows_that_are_not_there_are_reported(of: str) -> None:
    problem = FilterProblem("noise", rows=6, columns=300, depth=64)
    problem.row_index[[1, 4]] = torch.tensor([-1, 10**12])
    token, *statistics, _ = launch_filter.vocab_projection(*problem.arguments(of), Filters(5), search=SEARCH)
    assert (token < 0).tolist() == [False, True, False, False, True, False]
    assert all(value.isnan().tolist() == (token < 0).tolist() for value in statistics)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 5, "count": 3},
        {"count": 0},
        {"rows": 1},
        {"columns": 40},
        {"columns": 513, "uniform": 0.7},
        {"uniform": 0.0},
        {"depth": 72, "biased": True},
        {"depth": 72, "dtype": torch.bfloat16, "columns": 390},
        {"depth": 72, "dtype": torch.bfloat16, "columns": 390, "float8": True, "biased": True},
    ],
    ids=str,
)
def test_variations_agree_with_the_reference(changes: dict[str, Any]) -> None:
    problem = FilterProblem("noise", **{"rows": 3, "columns": 300} | changes)
    for filters in ((20, 0.8, 0.01), (0, 0.9, 0.0)):
        got = launch_filter.vocab_projection(*problem.arguments(), Filters(*filters), search=SEARCH)
        check_filtered(problem, got, filters)


PLAIN, GATHERED = Tiling(16, 128, 64, 4, 3), Tiling(32, 256, 64, 8, 3, gather=True)


@pytest.mark.parametrize(
    ("chunk_elements", "tiling", "filters"),
    [(1, PLAIN, (30, 1.0, 0.0)), (1, GATHERED, (0, 1.0, 0.05)), (100_000, PLAIN, (0, 1.0, 0.05))],
    ids=["chunks of a tile", "chunks of a gathered tile", "one chunk"],
)
def test_chunks_do_not_matter(chunk_elements: int, tiling: Tiling, filters: tuple[int, float, float]) -> None:
    """Chunks all of whose rows count, some, and none."""
    problem = FilterProblem("noise", rows=35, columns=300, depth=64, count=18)
    got = launch_filter.vocab_projection(
        *problem.arguments(), Filters(*filters), tiling=tiling, search=SEARCH, chunk_elements=chunk_elements
    )
    check_filtered(problem, got, filters)


def test_bad_rows_are_reported() -> None:
    problem = FilterProblem("noise", rows=6, columns=300)
    for row, fill in enumerate((torch.nan, torch.inf)):
        problem.hidden[problem.row_index[row], 77] = fill
    problem.hidden[problem.row_index[2]] = -torch.inf
    token, *statistics = launch_filter.vocab_projection(*problem.arguments(), Filters(5, 0.9, 0.1), search=SEARCH)
    assert token[:3].tolist() == [-1, -1, -1]
    assert (token[3:] >= 0).all()
    assert all(bool(value[:3].isnan().all()) and bool(value[3:].isfinite().all()) for value in statistics)


def test_no_rows() -> None:
    assert launch_filter.vocab_projection(*FilterProblem("noise", rows=0).arguments(), Filters(5))[0].shape == (0,)


# Divergence.


def heads(
    dtype: torch.dtype = torch.float32, logits: bool = False, columns: int = 301, float8: bool = False
) -> tuple[Any, ...]:
    """The second head, or the first with ``logits=True``, is of another kind than the other."""
    generator = torch.Generator().manual_seed(4)
    parts: list[Any] = []
    for depth in (24, 72):
        if logits and depth == 24:
            parts += [torch.randn(40, columns, generator=generator) * 3, None]
        else:
            parts += [torch.randn(40, depth, generator=generator).to(dtype)]
            parts += [(torch.randn(columns, depth, generator=generator) * 0.4).to(dtype)]
        bias = torch.randn(columns, generator=generator)
        bias[[3, columns - 1]] = -torch.inf
        weight, weight_scale = in_float8(parts[-1]) if float8 and depth == 72 else (parts[-1], None)
        shape = 0.5 if depth == 24 else 1.0, 0.0 if depth == 24 else 3.0
        parts[-1] = Head(weight, bias, *shape, weight_scale)
    return *parts, torch.randperm(40, generator=generator)[:37]


DIVERGENCE_TILINGS = {
    "small": Tiling(16, 128, 64, 4, 3),
    "gathered": Tiling(32, 64, 32, 4, 3, gather=True),
}


@pytest.mark.parametrize("tiling", DIVERGENCE_TILINGS)
@pytest.mark.parametrize("programs", [1, 3, 64])
@pytest.mark.parametrize("changes", [{}, {"dtype": torch.bfloat16}, {"logits": True}, {"float8": True}], ids=str)
def test_divergence_is_the_references(changes: dict[str, Any], programs: int, tiling: str) -> None:
    arguments = heads(**changes)
    got = launch_divergence.divergence(*arguments, tiling=DIVERGENCE_TILINGS[tiling], programs=programs)
    for value, want in zip(got, reference.divergence(*arguments)):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)


def test_divergence_with_ids_excluded() -> None:
    hidden, (weight, bias, *_), *_, rows = heads()
    free, bound = (hidden, Head(weight, None, 1.0, 0.0)), (hidden, Head(weight, bias, 1.0, 0.0))
    for p, q in ((free, bound), (bound, free), (bound, bound)):
        got = launch_divergence.divergence(*p, *q, rows, programs=5)
        for value, want in zip(got, reference.divergence(*p, *q, rows)):
            torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)
    assert launch_divergence.divergence(*free, *bound, rows)[0].isinf().all()


def test_divergence_of_bad_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    p, q = torch.randn(8, 200, generator=generator), torch.randn(8, 200, generator=generator)
    p[0, 5], q[1, 5], p[2, 7], q[3, 7] = torch.nan, torch.nan, torch.inf, torch.inf
    p[4], q[5] = -torch.inf, -torch.inf
    p[6, 1:], q[6, 1:], q[7, 9] = -torch.inf, -torch.inf, -torch.inf
    p[7, 9] = -200.0  # so improbable that its probability is 0 in float32
    logits = Head(None, None, 1.0, 0.0)
    arguments = (p, logits, q, logits, torch.arange(8))
    for value, want in zip(launch_divergence.divergence(*arguments, programs=3), reference.divergence(*arguments)):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_divergence_of_no_rows() -> None:
    assert launch_divergence.divergence(*heads()[:-1], torch.arange(0))[0].shape == (0,)
