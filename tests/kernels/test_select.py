"""`select`: each rule against its definition, and the state that it updates."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from mdkern.kernels import select
from mdkern.kernels.loop import triton_select
from mdkern.kernels.loop.select import select_operator, select_reference
from tests.own_process import run_in_the_interpreter
from tests.problems.selection import AWKWARD, BOUNDS, ENDS, RULES, awkward_selection, outcomes, random_selection

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
if interpreted:
    from tests.suites.interpreter import mend_interpreter  # noqa: F401 (a fixture that all tests here use)


def chosen_by_definition(scores: list[float], rule: str, bound: float, quota: int) -> set[int]:
    """The rules, word by word, on the candidates' scores of one sequence."""
    sign = -1.0 if rule == "entropy_bound" else 1.0
    best_first = sorted(range(len(scores)), key=lambda i: (-sign * scores[i], i))
    if rule == "top_k":
        return set(best_first[:quota])
    if rule == "threshold":
        return {i for i in best_first if scores[i] >= bound} or set(best_first[:1])
    length = 0
    for n, i in enumerate(best_first, start=1):
        if rule == "factor" and (n + 1) * (1 - scores[i]) >= bound:
            break
        prefix = [scores[j] for j in best_first[:n]]
        if rule == "entropy_bound" and sum(prefix) - max(prefix) > bound + 1e-9:
            break
        length = n
    return set(best_first[: max(length, 1)])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trial", range(8))
def test_rules_are_their_definitions(rule: str, trial: int) -> None:
    (scores, candidates, tokens, quota, *_), input_ids = random_selection(rule, trial)
    scores = scores.nan_to_num(nan=3.0 if rule == "entropy_bound" else 0.0)
    bound = BOUNDS[rule]
    chosen = select(scores, candidates, tokens, input_ids, rule, quota=quota, bound=bound)
    for row in range(scores.shape[0]):
        entries = (candidates[row] & (tokens[row] >= 0)).nonzero()[:, 0].tolist()
        values = [float(scores[row, e]) for e in entries]
        want = chosen_by_definition(values, rule, bound, int(quota[row]) if quota is not None else 0)
        assert {entries[i] for i in want} == set(chosen[row].nonzero()[:, 0].tolist())
        revealed = chosen[row].nonzero()[:, 0]
        assert torch.equal(input_ids[row, revealed], tokens[row, revealed])
        input_ids[row, revealed] = -7
    assert (input_ids == -7).all()


def plain(scores: Tensor, rule: Any, **options: Any) -> list[int]:
    tokens = torch.ones_like(scores, dtype=torch.int64)
    chosen = select(
        scores, torch.ones_like(scores, dtype=torch.bool), tokens, torch.zeros_like(tokens), rule, **options
    )
    return chosen[0].nonzero()[:, 0].tolist()


def test_ties_go_to_the_lower_position() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.9, 0.9, -0.0, 0.0]])
    assert plain(scores, "top_k", quota=torch.tensor([2])) == [1, 3]
    assert plain(scores, "top_k", quota=torch.tensor([4])) == [0, 1, 3, 4]
    assert plain(scores, "top_k", quota=torch.tensor([6])) == [0, 1, 2, 3, 4, 5]
    assert plain(scores, "threshold", bound=0.95) == [1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("level", [1.0, 5.0])  # of the best score: float32 is coarser above 1
def test_rounding_does_not_choose(rule: str, level: float) -> None:
    """Scores that are off by up to four units in the last place choose what the scores themselves do."""
    generator = torch.Generator().manual_seed(1)
    exact = (1.0 - torch.randint(4, (3, 40), generator=generator) / 64) * level
    if rule == "entropy_bound":
        exact = exact.flip(1) / 4
    candidates = torch.rand(3, 40, generator=generator) < 0.9
    tokens, quota = torch.ones(3, 40, dtype=torch.int64), torch.tensor([3, 11, 29]) if rule == "top_k" else None
    bounds = {"top_k": 0.0, "threshold": 0.99 * level, "factor": 0.4, "entropy_bound": 2.1}
    found = set()
    for trial in range(30):
        units = torch.randint(-4, 5, exact.shape, generator=generator) * (trial > 0)
        scores = (exact.view(torch.int32) + units.int()).view(torch.float32)
        chosen = select(scores, candidates, tokens, tokens.clone(), rule, quota=quota, bound=bounds[rule])
        found.add(tuple(map(tuple, chosen.tolist())))
    assert len(found) == 1


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_scores_the_lowest_position_is_chosen(rule: str) -> None:
    quota = torch.tensor([2]) if rule == "top_k" else None
    for units in (0, 1, 4):
        scores = torch.full((1, 9), 0.5).view(torch.int32) + units * torch.tensor([3, -1, 0, 2, 1, -4, 4, -2, 0]).int()
        chosen = plain(scores.view(torch.float32), rule, quota=quota, bound=0.9 if rule == "threshold" else 0.1)
        assert chosen == ([0, 1] if rule == "top_k" else [0])


def test_entropies_of_nothing_but_rounding_sum_to_nothing() -> None:
    entropies = torch.tensor([[3e-7, -2e-7, 1e-6, 0.5, 0.0, 0.25]])
    assert plain(entropies, "entropy_bound", bound=0.0) == [0, 1, 2, 4, 5]


def test_scores_that_differ_by_more_are_told_apart() -> None:
    assert plain(torch.tensor([[0.5, 0.50002]]), "top_k", quota=torch.tensor([1])) == [1]
    assert plain(torch.tensor([[5.0, 5.0001]]), "top_k", quota=torch.tensor([1])) == [1]
    assert plain(torch.tensor([[-torch.inf, torch.inf, torch.inf]]), "top_k", quota=torch.tensor([1])) == [1]


def test_bounds_at_their_ends() -> None:
    entropies = torch.tensor([[0.5, 0.1, 0.2]])
    assert plain(entropies, "entropy_bound", bound=0.0) == [1]
    assert plain(entropies, "entropy_bound", bound=float("inf")) == [0, 1, 2]
    assert plain(torch.tensor([[0.9, 0.1]]), "factor", bound=0.0) == [0]
    assert plain(torch.tensor([[0.9, 0.1]]), "top_k", quota=torch.tensor([0])) == []


def test_random_positions_follow_the_softmax() -> None:
    """The first position drawn at temperature t is distributed as softmax(scores / t)."""
    draws, temperature = 20_000, 0.5
    scores = torch.tensor([0.1, 0.9, 0.4, 0.0, 0.7]).expand(draws, 5).contiguous()
    tokens = torch.ones(draws, 5, dtype=torch.int64)
    sample = torch.arange(draws)[:, None].expand(draws, 5)
    keys = torch.stack((sample, torch.arange(5).expand(draws, 5), torch.zeros_like(sample)), -1)
    one = torch.ones(draws, dtype=torch.int64)
    chosen = select(
        scores, tokens.bool(), tokens, torch.zeros_like(tokens), "top_k", quota=one, temperature=temperature,
        seed=torch.tensor(3), keys=keys,
    )  # fmt: skip
    expected = (scores[0].double() / temperature).softmax(-1) * draws
    assert (chosen.sum(-1) == 1).all()
    assert stats.chisquare(chosen.sum(0).numpy(), expected.numpy()).pvalue > 1e-4


GOOD: dict[str, Any] = {
    "scores": torch.rand(2, 5),
    "candidates": torch.ones(2, 5, dtype=torch.bool),
    "tokens": torch.ones(2, 5, dtype=torch.int64),
    "input_ids": torch.zeros(2, 7, dtype=torch.int64),
    "rule": "top_k",
    "quota": torch.tensor([1, 2]),
    "temperature": 0.5,
    "seed": torch.tensor(1),
    "keys": torch.ones(2, 5, 3, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quota": None}, "quota"),
        ({"quota": torch.tensor([1.0, 2.0])}, "quota must be torch.int64"),
        ({"rule": "best"}, "rule"),
        ({"rule": "threshold", "quota": None}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"bound": float("nan")}, "bound must be a number"),
        ({"seed": None}, "seed"),
        ({"seed": torch.tensor(1, dtype=torch.int32)}, "seed must be torch.int64"),
        ({"keys": torch.ones(2, 5, 3, dtype=torch.int32)}, "keys must be torch.int64"),
        ({"scores": torch.rand(2, 5).double()}, "scores must be torch.float32"),
        ({"scores": torch.rand(2, 5).to_sparse()}, "scores must be torch.float32"),
        ({"scores": torch.rand(2, 5, device="meta")}, "meta"),
        ({"tokens": torch.ones(2, 5, dtype=torch.int64, device="meta")}, "meta"),
        ({"candidates": torch.ones(2, 5)}, "candidates must be torch.bool"),
        ({"input_ids": torch.zeros(2, 1, dtype=torch.int64).expand(2, 7)}, "contiguous"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.int64)}, "L at least R"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    assert int(select(**(GOOD | {"input_ids": torch.zeros(2, 7, dtype=torch.int64)})).sum()) == 3
    with pytest.raises(ValueError, match=message):
        select(**(GOOD | changes))


@pytest.mark.parametrize("rule", RULES)
def test_the_operator_is_well_registered(rule: str) -> None:
    arguments, state = random_selection(rule, 1)
    torch.library.opcheck(select_operator, (*arguments[:3], state, *arguments[3:]))


@pytest.mark.skipif(not interpreted, reason="the next test runs it in Triton's interpreter")
@pytest.mark.parametrize("held", [4096, 32])
@pytest.mark.parametrize("rule", RULES)
def test_kernel_interpreted(rule: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a sequence in one block and in several."""
    monkeypatch.setattr(triton_select, "MOST_HELD", held)
    for number in range(len(AWKWARD)):
        for bound in {ENDS[rule][(number + shift) % len(ENDS[rule])] for shift in (0, 2)}:
            problem = awkward_selection(rule, number, bound, entries=50)
            for want, got in outcomes((select_reference, triton_select.select), *problem):
                assert torch.equal(want, got), (number, bound)
    for trial in range(4):
        problem = random_selection(rule, trial, sequences=2, entries=70)
        for want, got in outcomes((select_reference, triton_select.select), *problem):
            assert torch.equal(want, got), trial


@pytest.mark.skipif(interpreted, reason="one interpreter is enough")
@pytest.mark.slow
def test_kernel_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/kernels/test_select.py", "kernel_interpreted")


@pytest.mark.skipif(interpreted, reason="the interpreter compiles nothing")
@pytest.mark.slow
def test_kernel_compiles_for_every_gpu() -> None:
    """Every rule, sequences that fit in a block and that do not, with all optional tensors and with none."""
    from tests.suites.compiled_head import build

    for capability, (number, rule) in itertools.product((80, 90, 100), enumerate(RULES)):
        for absent in ({"held": None}, {}):
            constants = {"RULE": number, "RANDOM": rule == "top_k", "BLOCK": triton_select.MOST_HELD, **absent}
            build(triton_select.select_kernel, capability, constants, {}, triton_select.warps(triton_select.MOST_HELD))


@pytest.mark.gpu
@pytest.mark.parametrize("entries", [1, 1000, 4096, 5000, 32_768])
@pytest.mark.parametrize("rule", RULES)
def test_gpu_selection_is_the_references(rule: str, entries: int) -> None:
    for trial in (0, 1, 2, 4):
        problem = random_selection(rule, trial, sequences=3, entries=entries, device="cuda")
        drawn = problem[0][-1] > 0
        for want, got in outcomes((select_reference, select_operator), *problem):
            assert (want != got).sum() <= (2 if drawn else 0)  # noise may differ in its last bit
    for number in range(len(AWKWARD)):
        for bound in ENDS[rule]:
            problem = awkward_selection(rule, number, bound, entries, device="cuda")
            for want, got in outcomes((select_reference, select_operator), *problem):
                assert torch.equal(want, got), (number, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_gpu_selection_of_the_longest_does_not_wait(rule: str) -> None:
    arguments, state = random_selection(rule, 0, sequences=2, entries=32_768, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_operator(*arguments[:3], state, *arguments[3:])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_refuses_what_it_cannot_count() -> None:
    scores = torch.zeros(1, triton_select.MOST_ENTRIES + 1, device="cuda")
    with pytest.raises(ValueError, match="65535"):
        plain(scores, "threshold")
