"""`select`: each rule against its definition, and the state that it updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from mdkern.kernels import reference, select
from mdkern.kernels.select import _select
from tests.kernels_selection import BOUNDS, RULES, random_selection


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
    (scores, candidates, tokens, positions, quota, *_), (input_ids, masked, remaining) = random_selection(rule, trial)
    scores = scores.nan_to_num(nan=3.0 if rule == "entropy_bound" else 0.0)
    bound = BOUNDS[rule]
    chosen = select(
        scores, candidates, tokens, input_ids, rule, quota=quota, bound=bound, positions=positions, masked=masked,
        remaining=remaining,
    )  # fmt: skip
    for row in range(scores.shape[0]):
        entries = (candidates[row] & (tokens[row] >= 0)).nonzero()[:, 0].tolist()
        values = [float(scores[row, e]) for e in entries]
        want = chosen_by_definition(values, rule, bound, int(quota[row]) if quota is not None else 0)
        assert {entries[i] for i in want} == set(chosen[row].nonzero()[:, 0].tolist())
        columns = positions[row, chosen[row]]
        assert torch.equal(input_ids[row, columns], tokens[row, chosen[row]])
        assert not masked[row, columns].any()
        assert int(masked[row].sum()) == masked.shape[1] - int(chosen[row].sum())
        assert int(remaining[row]) == 50 - int(chosen[row].sum())
        untouched = masked[row]
        assert (input_ids[row, untouched] == -7).all()


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


def test_arguments_that_do_not_fit_are_refused() -> None:
    scores = torch.rand(2, 5)
    with pytest.raises(ValueError, match="quota"):
        plain(scores, "top_k")
    with pytest.raises(ValueError, match="rule"):
        plain(scores, "best")
    with pytest.raises(ValueError, match="temperature"):
        plain(scores, "threshold", temperature=1.0)
    with pytest.raises(ValueError, match="scores"):
        plain(scores.double(), "threshold")


@pytest.mark.parametrize("rule", RULES)
def test_the_operator_is_well_registered(rule: str) -> None:
    arguments, state = random_selection(rule, 1)
    torch.library.opcheck(_select, (*arguments[:3], *state, *arguments[3:]))


@pytest.mark.gpu
@pytest.mark.parametrize(("rule", "entries"), [*((rule, 1000) for rule in RULES), ("top_k", 1), ("factor", 32_768)])
def test_gpu_selection_is_the_references(rule: str, entries: int) -> None:
    for trial in (0, 1, 2, 4):
        arguments, state = random_selection(rule, trial, sequences=3, entries=entries, device="cuda")
        outcomes = []
        for implementation in (reference.select, _select):
            written = tuple(x.clone() for x in state)
            chosen = implementation(*arguments[:3], *written, *arguments[3:])
            outcomes.append((chosen, *written))
        for want, got in zip(*outcomes):
            assert (want != got).sum() <= (2 if arguments[-1] > 0 else 0)  # noise may differ in its last bit
