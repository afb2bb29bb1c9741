"""Texts do not depend on the batch size, nor on how samples are shared out, where all positions are alike at first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mdkern
from tests.conftest import random_dit

MODELS = {seed: random_dit(seed) for seed in (1, 7)}  # of those tried, the ones whose equal rows differ most
SAMPLES = 7


def draw(seed: int, decoder: str, length: int, **options: object) -> Tensor:
    asked = {"length": length, "steps": max(1, length // 2), "decoder": decoder, "seed": 3} | options
    return mdkern.sample(MODELS[seed], **asked).sequences


@pytest.mark.parametrize("decoder", ["top_probability", "margin", "entropy", "threshold", "factor", "entropy_bound"])
@pytest.mark.parametrize("seed", list(MODELS))
def test_equal_positions_are_taken_in_order(decoder: str, seed: int) -> None:
    for length in (2, 9):
        whole = draw(seed, decoder, length, num_samples=SAMPLES)
        for batch_size in (1, 3):
            assert torch.equal(draw(seed, decoder, length, num_samples=SAMPLES, batch_size=batch_size), whole)
        parts = [range(3), range(3, SAMPLES)]  # as two processes have them
        shared = [draw(seed, decoder, length, num_samples=len(part), sample_ids=list(part)) for part in parts]
        assert torch.equal(torch.cat(shared), whole)
