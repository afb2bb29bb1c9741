"""Measures on a GPU are those on the CPU; schedules that share their passes have the samples of each one alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from mdkern import DiT, Schedule, likelihood, load_pair, sample
from mdkern.engine.branches import run_schedules
from mdkern.evaluation.importance import importance, path_importance

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair() -> tuple[DiT, DiT]:
    heavy, light, _ = load_pair("cpu", torch.float32)
    return heavy, light


@pytest.fixture(scope="module")
def on_gpu() -> tuple[DiT, DiT]:
    heavy, light, _ = load_pair("cuda", torch.float32)
    return heavy, light


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    heavy, _, _ = load_pair("cpu", torch.float32)
    sequences = sample(heavy, num_samples=4, length=64, steps=32, seed=0).sequences
    assert sequences is not None
    return sequences


def test_likelihoods_agree(pair: tuple[DiT, DiT], on_gpu: tuple[DiT, DiT], ids: torch.Tensor) -> None:
    right = likelihood(*pair, "L8 H16 L8", input_ids=ids, samples=8)
    found = likelihood(*on_gpu, "L8 H16 L8", input_ids=ids.cuda(), samples=8)
    assert found.nats.tolist() == pytest.approx(right.nats.tolist(), rel=1e-4)


def test_importances_agree(pair: tuple[DiT, DiT], on_gpu: tuple[DiT, DiT], ids: torch.Tensor) -> None:
    right = importance(*pair, input_ids=ids, times=3, progress=False)
    found = importance(*on_gpu, input_ids=ids.cuda(), times=3, progress=False)
    for ours, theirs in zip(found, right):
        assert ours.kl.mean == pytest.approx(theirs.kl.mean, rel=1e-3)
        assert ours.loss_difference.mean == pytest.approx(theirs.loss_difference.mean, rel=1e-2)


def test_path_importance_needs_no_logits_in_memory(on_gpu: tuple[DiT, DiT]) -> None:
    """Of 64 texts of 256 tokens, all logits of two models would take 537 MB."""
    path_importance(*on_gpu, num_samples=64, length=256, steps=16, segments=2, progress=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    path_importance(*on_gpu, num_samples=64, length=256, steps=16, segments=2, progress=False)
    assert torch.cuda.max_memory_allocated() - before < 300e6


def test_shared_passes_give_the_samples_of_each_schedule(on_gpu: tuple[DiT, DiT]) -> None:
    models = dict(zip("HL", on_gpu))
    schedules = [s for s in itertools.product("HL", repeat=3) if s.count("L") == 1]
    asked = {"num_samples": 20, "length": 48, "steps": 30, "batch_size": 8, "seed": 5}
    for schedule, found in run_schedules(models, schedules, **asked):
        alone = sample(models, Schedule.from_segments(schedule), **asked).sequences
        assert alone is not None
        assert float((found == alone).float().mean()) > 0.99  # rounding of another batch may turn a tie
