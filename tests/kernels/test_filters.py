"""`top_k`, `top_p` and `min_p` of `vocab_projection`: which ids are kept, by their definitions; and on a GPU how."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mdkern.kernels import vocab_projection
from mdkern.kernels.head import reference
from mdkern.kernels.head.arguments import NO_FILTERS, Filters
from mdkern.kernels.head.vocab_projection import _vocab_projection
from tests.kernels.test_vocab_projection import chi_square, filtered, head
from tests.own_process import run_in_the_interpreter
from tests.problems.filters import FILTERS, ROWS, FilterProblem, check_filtered
from tests.problems.projection import NAMES, SEED, exact_statistics, flat

HALF, FULL = torch.bfloat16, torch.float32
V = 50_258


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_filters.py")


@pytest.mark.slow
def test_kernels_compile_for_every_gpu() -> None:
    from tests.suites import compiled_filters

    compiled_filters.main()


# Which ids are kept: the first ones of an order by probability, the lower id first among equals.


def kept(logits: Tensor, *filters: Any, **named: Any) -> Tensor:
    return reference.keep_most_probable(logits, *Filters(*filters, **named)) > -torch.inf


def rows(kind: str, count: int = 4, columns: int = 700) -> Tensor:
    return ROWS[kind](torch.Generator().manual_seed(5), count, columns)


def kept_by_definition(logits: list[float], top_k: int, top_p: float, within: bool = False) -> list[int]:
    """Ids that are kept, one after the other from the most probable."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = [i for i in order if logits[i] > -math.inf][: top_k or None]
    weight = [math.exp(logits[i] - logits[order[0]]) for i in order]
    goal, total, number = top_p * sum(weight), 0.0, 0
    for number, one in enumerate(weight):
        if total >= goal - 1e-9 or (within and number > 0 and total + one > goal + 1e-9):
            break
        total += one
    else:
        number = len(order)
    return order[:number]


@pytest.mark.parametrize("rule", ["reach", "within"])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.513), (0, 0.267), (5, 0.613), (4, 0.771)])
def test_few_ids_are_kept_by_definition(top_k: int, top_p: float, rule: Any) -> None:
    """Logits of few values, so that equals are cut; weights of 1, 1/2 and 1/4, whose sums are never near the goal."""
    values = torch.tensor([0.0, -math.log(2), -math.log(4), -torch.inf])
    logits = values[torch.randint(0, 4, (200, 8), generator=torch.Generator().manual_seed(3))]
    logits[:, 5] = 0.0
    logits[0], logits[1] = 0.0, torch.tensor([0.0] + [-torch.inf] * 7)
    keep = kept(logits, top_k, top_p, top_p_rule=rule)
    for row, mask in zip(logits.tolist(), keep):
        assert mask.nonzero()[:, 0].tolist() == sorted(kept_by_definition(row, top_k, top_p, rule == "within"))


def test_the_fewest_of_equals_are_kept() -> None:
    logits = torch.zeros(1, 10)
    assert kept(logits, top_p=0.5)[0].tolist() == [True] * 5 + [False] * 5
    assert kept(logits, top_k=1)[0].tolist() == [True] + [False] * 9
    assert kept(logits, 4, 0.5)[0].tolist() == [True] * 2 + [False] * 8
    assert kept(logits, min_p=1.0).all()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("k", [1, 7, 699])
def test_top_k_keeps_k(kind: str, k: int) -> None:
    logits = rows(kind)
    keep = kept(logits, k)
    assert torch.equal(keep.sum(-1), (logits > -torch.inf).sum(-1).clamp(max=k))
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert keep.gather(1, order)[:, : int(keep.sum(-1).min())].all()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_it(kind: str, share: float) -> None:
    logits = rows(kind)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    keep = kept(logits, top_p=share).gather(1, order)
    number = keep.sum(-1, keepdim=True)
    assert torch.equal(keep, torch.arange(keep.shape[1]) < number)  # a prefix
    total = logits.double().gather(1, order).softmax(-1).cumsum(-1)
    assert (total.gather(1, number - 1) >= share - 1e-6).all()
    assert (number == 1).logical_or(total.gather(1, (number - 2).clamp(min=0)) < share + 1e-6).all()


@pytest.mark.parametrize("kind", ["noise", "integers", "peaked", "zipf"])
def test_the_nucleus_within_leaves_out_the_id_that_crosses(kind: str) -> None:
    """By the rule of ReMDM's and BD3-LM's code: of the sorted probabilities those whose running sum is at most p."""
    logits = rows(kind)
    ordered = logits.double().sort(dim=-1, descending=True, stable=True)
    wanted = ordered.values.softmax(-1).cumsum(-1) <= 0.9
    wanted[:, 0] = True
    assert torch.equal(kept(logits, top_p=0.9, top_p_rule="within").gather(1, ordered.indices), wanted)


@pytest.mark.parametrize("kind", ROWS)
def test_min_p_keeps_what_is_so_probable_of_the_best(kind: str) -> None:
    logits = rows(kind)
    relative = (logits.double() - logits.double().amax(-1, keepdim=True)).exp()
    keep = kept(logits, min_p=0.05)
    assert keep[relative > 0.05 + 1e-5].all()
    assert not keep[relative < 0.05 - 1e-5].any()


def test_top_k_of_the_vocabulary_or_more_is_no_filter() -> None:
    problem = FilterProblem("noise", rows=20, columns=300)
    wanted = draw(problem, ())
    for top_k in (300, 301, 10**9):
        assert torch.equal(draw(problem, (top_k, 1.0, 0.0)), wanted)


def test_top_k_of_one_is_greedy() -> None:
    problem = FilterProblem("noise", rows=30, columns=300)
    assert torch.equal(draw(problem, (1, 1.0, 0.0)), problem.logits().argmax(-1))


def test_statistics_do_not_see_the_filters() -> None:
    problem = FilterProblem("zipf", rows=30, columns=300)
    plain = reference.vocab_projection(*problem.arguments(), NO_FILTERS)
    got = reference.vocab_projection(*problem.arguments(), Filters(3, 0.5, 0.3))
    for value, want in zip(got[2:], plain[2:]):
        assert torch.equal(value, want)


@pytest.mark.parametrize("of", ["model", "sampler"])
def test_statistics_are_of_the_distribution_asked_for(of: str) -> None:
    """Against float64, the kept ids by their definition; greedy rows are of temperature 1."""
    problem = FilterProblem("integers", rows=12, columns=40)
    token, *statistics = reference.vocab_projection(*problem.arguments(of), Filters(9, 0.8))
    logits = problem.logits()
    if of == "sampler":
        logits = logits / problem.temperatures.where(problem.temperatures > 0, 1.0).double()[:, None]
        for row in logits:
            others = torch.ones(40, dtype=torch.bool)
            others[kept_by_definition(row.tolist(), 9, 0.8)] = False
            row[others] = -torch.inf
    for name, value, truth in zip(NAMES, statistics, exact_statistics(logits, token)):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("filters", [(-1, 1.0, 0.0), (0, 0.0, 0.0), (0, 1.1, 0.0), (0, math.nan, 0.0), (0, 1.0, 1.5)])
def test_filters_that_mean_nothing_are_refused(filters: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="top_k must be"):
        draw(FilterProblem("noise"), filters)


def draw(problem: FilterProblem, filters: tuple[Any, ...], rows: slice = slice(None)) -> Tensor:
    names = dict(zip(("top_k", "top_p", "min_p"), filters))
    index, keys, temperature = problem.row_index[rows], problem.keys[rows], problem.temperatures[rows]
    bias, count = problem.bias, problem.row_count
    arguments = (problem.hidden, problem.weight, bias, index, temperature, problem.seed, keys)
    return vocab_projection(*arguments, row_count=count, **names).token


def test_the_operator_is_well_registered_with_filters() -> None:
    problem = FilterProblem("noise", rows=5, columns=90, depth=16)
    torch.library.opcheck(_vocab_projection, flat((*problem.arguments("sampler"), Filters(5, 0.9, 0.01))))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("of", ["model", "sampler"])
@pytest.mark.parametrize("kind", ROWS)
def test_gpu_tokens_of_hard_rows(kind: str, of: str) -> None:
    problem = FilterProblem(kind, rows=50, columns=5003, device="cuda")
    for filters in (*FILTERS, (4000, 0.95, 0.001), (0, 0.61, 0.0, "within")):
        got = _vocab_projection(*flat(problem.arguments(of)), *filters)
        check_filtered(problem, got, filters, differing=1, of=of)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 1, "columns": V, "depth": 768, "dtype": HALF},
        {"rows": 16, "columns": V, "depth": 768, "dtype": HALF, "biased": True},
        {"rows": 150, "columns": V, "depth": 768, "dtype": HALF, "count": 111},
        {"rows": 200, "columns": 50_257, "depth": 512, "dtype": HALF, "biased": True},
        {"rows": 20, "columns": 151_936, "depth": 136, "dtype": HALF, "uniform": 1.0},
        {"rows": 70, "columns": 777, "depth": 77, "dtype": torch.float16, "biased": True},
        {"rows": 60, "columns": 3000, "depth": 100, "dtype": FULL},
        {"rows": 60, "columns": 40, "depth": 64, "dtype": HALF, "count": 0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_gpu_agrees_with_the_reference(changes: dict[str, Any]) -> None:
    problem = FilterProblem("noise", device="cuda", **changes)
    for filters in ((50, 1.0, 0.0), (0, 0.9, 0.0), (2000, 0.9, 0.001)):
        got = _vocab_projection(*flat(problem.arguments()), *filters)
        check_filtered(problem, got, filters, differing=1 + problem.rows // 100)


@pytest.mark.gpu
@pytest.mark.parametrize("filters", [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (40, 0.7, 0.05)])
def test_gpu_leaves_the_exact_distribution_of_the_rest(filters: tuple[int, float, float]) -> None:
    logits, temperature, draws = head("normal") * 2, 0.8, 50_000
    number = torch.arange(draws, device="cuda")
    keys = torch.stack((number, number * 0 + 5, number * 0 + 9), 1)
    row, seed = torch.zeros(draws, dtype=torch.int64, device="cuda"), torch.tensor(SEED, device="cuda")
    names: dict[str, Any] = dict(zip(("top_k", "top_p", "min_p"), filters))
    result = vocab_projection(logits[None].cuda(), None, None, row, temperature, seed, keys, **names)
    assert chi_square(result.token.cpu(), filtered(logits / temperature, *filters)) > 1e-4


@pytest.mark.gpu
def test_gpu_bad_rows_are_reported() -> None:
    problem = FilterProblem("noise", rows=300, columns=1000, depth=128, dtype=HALF, device="cuda")
    problem.hidden[problem.row_index[0], 5] = torch.nan
    problem.hidden[problem.row_index[299], 0] = torch.inf
    token = draw(problem, (50, 0.9, 0.01)).cpu()
    assert ((token == -1).nonzero()[:, 0]).tolist() == [0, 299]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 4096])
def test_gpu_memory_is_bounded(rows: int) -> None:
    problem = FilterProblem("noise", rows=rows, columns=V, depth=256, dtype=HALF, device="cuda")
    draw(problem, (50, 0.9, 0.01))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    draw(problem, (50, 0.9, 0.01))
    assert torch.cuda.max_memory_allocated() - before < 100 << 20


@pytest.mark.gpu
def test_gpu_graph_reads_the_count_and_never_synchronises() -> None:
    problem = FilterProblem("noise", rows=200, columns=3000, depth=128, dtype=HALF, device="cuda", count=200)
    filters = (100, 0.9, 0.001)
    whole = draw(problem, filters)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = draw(problem, filters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert problem.row_count is not None
    for count in (200, 3, 0, 111):
        problem.row_count.fill_(count)
        graph.replay()
        assert torch.equal(captured[:count], whole[:count])
        assert (captured[count:] == -1).all()


@pytest.mark.gpu
def test_gpu_tokens_do_not_depend_on_the_chunks() -> None:
    """Rows of logits, which no matrix product rounds anew: the same tokens whatever rows share a launch."""
    from mdkern.kernels.head import launch_filter

    problem = FilterProblem("integers", rows=300, columns=5003, device="cuda")
    tokens = [
        launch_filter.vocab_projection(*problem.arguments(), Filters(0, 0.5, 0.0), chunk_elements=elements)[0]
        for elements in (1, 100_000, 1 << 24)
    ]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
