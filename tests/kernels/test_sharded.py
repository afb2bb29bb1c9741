"""The output layer in shards of the vocabulary: merged, they give what the whole one gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mdkern.kernels import RowStatistics
from mdkern.kernels.head import reference, sharded
from mdkern.kernels.head.arguments import Rows, Wanted
from mdkern.kernels.head.sharded import RECORD, shard_of, vocab_projection_sharded
from tests.own_process import run_in_the_interpreter
from tests.problems.projection import FLOAT8_CHECKS, NAMES, Problem, exact_statistics, flat

PROBLEMS: list[dict[str, Any]] = [
    {},
    {"columns": 1500, "biased": True, "count": 13, "spread": 5.0},
    {"columns": 3000, "temperature": "greedy"},
    {"columns": 2000, "of": "sampler"},
    {"dtype": torch.bfloat16, "options": {"scale": 0.5, "soft_cap": 5.0}},
    {"columns": 1500, "float8": True, "biased": True},
]


def in_shards(problem: Problem, ranks: int, **options: Any) -> RowStatistics:
    """`vocab_projection_sharded` of every process of a group of `ranks`, of which all give the same."""
    found: list[Tensor] = []
    wanted = {"want_top": True, "want_entropy": True, "want_argmax": True, "of": problem.of}
    arguments = {"row_count": problem.row_count} | wanted | problem.options | options

    def run(rank: int, exchange: Any) -> RowStatistics:
        part = slice(*shard_of(problem.columns, rank, ranks))
        assert problem.weight is not None
        return vocab_projection_sharded(
            problem.hidden,
            problem.weight[part],
            None if problem.bias is None else problem.bias[part],
            problem.row_index,
            problem.temperatures,
            problem.seed,
            problem.keys,
            first=part.start,
            exchange=exchange,
            weight_scale=None if problem.weight_scale is None else problem.weight_scale[part],
            **arguments,
        )

    def keep(records: Tensor) -> Tensor:
        found.append(records)
        return records[None]

    for rank in range(ranks):
        run(rank, keep)
    return run(0, lambda _: torch.stack(found))


def check_shards(problem: Problem, got: RowStatistics, differing: int = 0) -> None:
    """Tokens of the whole vocabulary, statistics of float64."""
    count = problem.rows if problem.count is None else problem.count
    whole = problem.run()
    assert int((got.token != whole.token).sum()) <= differing
    assert torch.equal(got.argmax, whole.argmax)
    exact = exact_statistics(problem.logits()[:count], got.token[:count])
    for name, truth in zip(NAMES, exact):
        value = getattr(got, name)
        assert value[count:].isnan().all(), name
        torch.testing.assert_close(value[:count].double(), truth, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("changes", PROBLEMS, ids=str)
def test_shards_give_what_the_whole_gives(changes: dict[str, Any], ranks: int) -> None:
    problem = Problem(**changes)
    check_shards(problem, in_shards(problem, ranks))


@pytest.mark.parametrize("where", [3, 1400])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_logit_in_any_shard_spoils_the_row(where: int, value: float) -> None:
    problem = Problem(columns=1500, biased=True)
    assert problem.bias is not None
    problem.bias[where] = value
    got = in_shards(problem, 3)
    assert (got.token == -1).all()
    assert got.logsumexp.isnan().all()


@pytest.mark.parametrize("only", [[2], [1400], []])
def test_shards_without_a_possible_id_add_nothing(only: list[int]) -> None:
    problem = Problem(columns=1500)
    problem.bias = torch.full((1500,), -torch.inf)
    problem.bias[only] = 0.0
    got = in_shards(problem, 4)
    assert (got.token == (only[0] if only else -1)).all()
    if only:
        torch.testing.assert_close(got.log_prob, torch.zeros(20), rtol=0, atol=1e-5)
        assert (got.top2 == 0).all()
        torch.testing.assert_close(got.entropy, torch.zeros(20), rtol=0, atol=1e-5)


def test_equal_logits_go_to_the_lowest_id() -> None:
    """Greedy rows whose largest logit stands in three shards: the second largest probability equals the largest."""
    problem = Problem(columns=1500, temperature="greedy")
    assert problem.weight is not None
    problem.weight[[300, 700, 1400]] = problem.weight[:1] * 0
    problem.bias = torch.zeros(1500)
    problem.bias[[300, 700, 1400]] = 100.0
    got = in_shards(problem, 5)
    assert (got.token == 300).all()
    torch.testing.assert_close(got.top1, got.top2)


def test_draws_have_the_distribution_of_the_whole_vocabulary() -> None:
    """A shard wins as often as its share of the probability says: 4,000 draws of one row, three shards."""
    problem = Problem(rows=4000, columns=700, temperature="one", spread=1.0)
    problem.row_index = torch.zeros(4000, dtype=torch.int64)
    token = in_shards(problem, 3).token
    probability = problem.logits()[0].softmax(-1)
    for rank in range(3):
        first, stop = shard_of(700, rank, 3)
        expected = float(probability[first:stop].sum())
        share = float(((token >= first) & (token < stop)).double().mean())
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


@pytest.mark.parametrize("first", [-256, 64, 1])
def test_a_shard_that_begins_inside_a_tile_is_refused(first: int) -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="first must be a multiple of 256"):
        vocab_projection_sharded(
            problem.hidden, problem.weight, None, problem.row_index, 1.0, problem.seed, problem.keys, first=first,
            exchange=lambda records: records[None],
        )  # fmt: skip


def test_the_operators_meet_their_contracts() -> None:
    problem = Problem(rows=3, columns=300, depth=16)
    arguments = problem.arguments()
    torch.library.opcheck(sharded._project_shard, (*flat(arguments), 256))
    eight = flat(Problem(rows=3, columns=300, depth=16, float8=True).arguments())
    torch.library.opcheck(sharded._project_shard, (*eight, 256), test_utils=FLOAT8_CHECKS)
    records = reference.project_shard(*arguments, 0)
    assert records.shape == (3, RECORD)
    rows: Rows = arguments[2]
    torch.library.opcheck(sharded._merge_shards, (torch.stack((records, records)), *rows, *Wanted(True, False)))


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_head.py", "shards")


GPU_PROBLEMS: list[dict[str, Any]] = [  # each has another kernel
    {"rows": 1, "columns": 50_258, "depth": 768},
    {"rows": 16, "columns": 50_258, "depth": 768, "biased": True, "count": 13},
    {"rows": 16, "columns": 9000, "depth": 4096, "of": "sampler"},
    {"rows": 60, "columns": 50_258, "depth": 768, "temperature": "greedy"},
    {"rows": 200, "columns": 9000, "depth": 4096, "biased": True},
    {"rows": 500, "columns": 50_258, "depth": 768, "of": "sampler", "biased": True},
    {"rows": 3000, "columns": 12_000, "depth": 1000, "biased": True, "count": 2900},
    {"rows": 40, "columns": 5000, "depth": 100, "dtype": torch.float32},
    {"rows": 16, "columns": 9000, "depth": 768, "float8": True},
    {"rows": 300, "columns": 9000, "depth": 768, "float8": True, "biased": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", GPU_PROBLEMS, ids=str)
def test_shards_on_the_gpu_give_what_the_whole_gives(changes: dict[str, Any]) -> None:
    """Each shard on this one GPU."""
    problem = Problem(**{"dtype": torch.bfloat16, "device": "cuda"} | changes)
    whole = problem.run()
    assert whole.argmax is not None
    for ranks in (2, 3, 8):
        got = in_shards(problem, ranks)
        same = got.token == whole.token
        assert int((~same).sum()) <= problem.rows // 1000  # near-ties
        assert torch.equal(got.argmax, whole.argmax)
        for name in NAMES:
            ours, theirs = getattr(got, name)[same], getattr(whole, name)[same]
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, equal_nan=True, msg=name)
