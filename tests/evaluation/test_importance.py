"""Importance of times: held against enumeration on a denoiser whose every state is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mdkern.evaluation.importance import importance, path_importance
from mdkern.evaluation.intervals import Estimate, estimate, paired, rank_correlation
from tests.references.enumeration import LENGTH, MASK, VOCAB, ToyDenoiser

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")
HEAVY, LIGHT = ToyDenoiser(1), ToyDenoiser(2)


def log_p(model: ToyDenoiser, state: tuple[int, ...]) -> Tensor:
    """float64 ``[L, V]``."""
    return model.logits(torch.tensor([state]), torch.zeros(1))[0].double().log_softmax(-1)


def kl(state: tuple[int, ...], light: ToyDenoiser = LIGHT) -> Tensor:
    """float64 ``[L]``."""
    p, q = log_p(HEAVY, state), log_p(light, state)
    return (p.exp() * (p - q)).sum(-1)


def over_masks(text: tuple[int, ...], t: float) -> dict[str, float]:
    """The measures of one text by every mask that masks something, in float64."""
    total, chance = dict.fromkeys(("heavy", "light", "difference", "kl"), 0.0), 0.0
    for masked in itertools.product((False, True), repeat=LENGTH):
        if not any(masked):
            continue
        weight = math.prod(t if gone else 1 - t for gone in masked)
        state = tuple(MASK if gone else token for gone, token in zip(masked, text))
        at = [i for i, gone in enumerate(masked) if gone]
        heavy, light = (-sum(float(log_p(m, state)[i, text[i]]) for i in at) / len(at) for m in (HEAVY, LIGHT))
        values = {"heavy": heavy, "light": light, "difference": abs(light - heavy), "kl": float(kl(state)[at].mean())}
        total = {name: total[name] + weight * value for name, value in values.items()}
        chance += weight
    return {name: value / chance for name, value in total.items()}


def near(found: Estimate, right: float) -> bool:
    return abs(found.mean - right) < 4 * found.standard_error + 1e-6


def test_every_measure_is_its_expectation_over_masks() -> None:
    text = (2, 0, 3)
    found = importance(
        HEAVY.denoiser(), LIGHT.denoiser(), input_ids=torch.tensor([text]).expand(1500, -1), times=[0.3, 0.8, 1.0]
    )
    for at in found:
        right = over_masks(text, at.t)
        assert near(at.heavy_loss, right["heavy"])
        assert near(at.light_loss, right["light"])
        assert near(at.loss_difference, right["difference"])
        assert near(at.kl, right["kl"])
        assert at.relative_kl == at.kl.mean
    assert found[-1].kl.mean == pytest.approx(
        float(kl((MASK,) * LENGTH).mean()), abs=1e-5
    )  # at t = 1 nothing is random
    assert found[-1].kl.standard_error < 1e-7


def test_the_baseline_pair_is_subtracted_on_the_same_masks() -> None:
    ids = torch.randint(VOCAB, (300, LENGTH), generator=torch.Generator().manual_seed(0))
    (found,) = importance(
        HEAVY.denoiser(), LIGHT.denoiser(), baseline=LIGHT.denoiser(), input_ids=ids, times=[0.5], batch_size=7
    )
    assert found.baseline_kl == found.kl
    assert found.relative_kl == 0.0
    (same,) = importance(HEAVY.denoiser(), HEAVY.denoiser(), input_ids=ids, times=1)
    assert same.t == 0.5
    assert abs(same.kl.mean) < 1e-6
    assert same.loss_difference.mean == 0.0


def expected_path_kl(steps: int, eps: float = 1e-5) -> list[float]:
    """By step: the chain of the heavy model enumerated, each masked position's KL with its chance to be revealed."""
    times = [1 - (1 - eps) * i / steps for i in range(steps + 1)]
    states, out = {(MASK,) * LENGTH: 1.0}, []
    for now, after in itertools.pairwise(times):
        reveal, following, total = (now - after) / now, dict[tuple[int, ...], float](), 0.0
        for state, weight in states.items():
            at = [i for i, token in enumerate(state) if token == MASK]
            total += weight * reveal * float(kl(state)[at].sum())
            p = log_p(HEAVY, state).exp()
            choices = [
                [(MASK, 1 - reveal), *((v, reveal * float(p[i, v])) for v in range(VOCAB))]
                if i in at
                else [(token, 1.0)]
                for i, token in enumerate(state)
            ]
            for combination in itertools.product(*choices):
                outcome = tuple(token for token, _ in combination)
                chance = weight * math.prod(c for _, c in combination)
                following[outcome] = following.get(outcome, 0.0) + chance
        states = following
        out.append(total)
    return out


def test_the_path_kl_is_that_of_the_enumerated_chain() -> None:
    found = path_importance(
        HEAVY.denoiser(), LIGHT.denoiser(), num_samples=2000, length=LENGTH, steps=4, segments=2, progress=False
    )
    by_step = expected_path_kl(4)
    assert [(at.first, at.stop) for at in found] == [(0, 2), (2, 4)]
    assert near(found[0].revealed_kl, sum(by_step[:2]))
    assert near(found[1].revealed_kl, sum(by_step[2:]))
    assert found[0].masked_kl.mean == pytest.approx(float(kl((MASK,) * LENGTH).mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": [0.0]}, r"\(0, 1\]"),
        ({"times": []}, "at least one"),
        ({"times": 0}, "times"),
        ({"times": [1e-9]}, "masks"),
    ],
)
def test_times_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance(HEAVY.denoiser(), LIGHT.denoiser(), input_ids=torch.zeros(2, LENGTH, dtype=torch.int64), **changes)  # type: ignore[arg-type]


class TestIntervals:
    def test_a_mean_and_its_error(self) -> None:
        found = estimate(torch.tensor([1.0, 2.0, 4.0]))
        assert found.mean == pytest.approx(7 / 3)
        assert found.standard_error == pytest.approx(math.sqrt(7 / 3 / 3))  # variance 7/3 over 3 values
        assert found.interval[1] - found.mean == pytest.approx(1.959964 * math.sqrt(7 / 9))
        assert math.isnan(estimate(torch.tensor([1.0])).standard_error)
        with pytest.raises(ValueError, match="empty"):
            estimate(torch.empty(0))

    def test_pairs_lose_what_they_share(self) -> None:
        shared = 100 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = paired(shared + 1, shared)
        assert found.mean == pytest.approx(1.0)
        assert found.standard_error < 1e-12
        with pytest.raises(ValueError, match="pairs"):
            paired(shared, shared[1:])

    def test_rank_correlation_by_hand(self) -> None:
        """Ranks 0 1 2 3 and 1 0 2 3: 1 - 6 * 2 / (4 * 15) = .8; with a tie the ranks are shared."""
        assert rank_correlation(torch.tensor([1.0, 5.0, 7.0, 90.0]), torch.tensor([3, 2, 8, 9])) == pytest.approx(0.8)
        assert rank_correlation(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])) == pytest.approx(-1.0)
        tied = rank_correlation(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
        assert tied == pytest.approx(1.5 / math.sqrt(1.5 * 2))
