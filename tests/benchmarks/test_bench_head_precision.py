"""The benchmark of output layers in 8 bits runs at a size for a CPU, and finds no change where nothing is rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_head_precision
from benchmarks.bench_head_precision import FLOAT8, GEMM, SAMPLED, measure_quality
from tests.conftest import random_dit


def test_it_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_head_precision.main([str(tmp_path), "--tiny"]) == 0
    content = json.loads((tmp_path / "head-precision.json").read_text())
    assert [set(row["ms"]) for row in content["table"]] == [{SAMPLED, FLOAT8, GEMM}] * 2
    (row,) = content["quality"]["heavy"]
    assert 0.0 < row["variation"] < row["variation_99"] < 0.1
    assert 0.9 < row["same_draw"] <= 1.0
    assert "| 1,000 × 64 | 4 |" in capsys.readouterr().out


@pytest.mark.parametrize("exact", [True, False])
def test_what_float8_holds_exactly_is_not_changed(exact: bool) -> None:
    model = random_dit(2, vocab_size=300, mask_id=299, max_length=12)
    with torch.no_grad():
        if exact:  # powers of two, with 448 times that of its row in each
            model.head_weight.copy_(2.0 ** torch.randint(-3, 1, model.head_weight.shape) / 64)
            model.head_weight[:, 0] = 7.0
    (row,) = measure_quality(model, torch.randint(0, 299, (4, 12)), [1.0])
    assert row["positions"] == 48
    assert (row["variation"] < 1e-6) == exact
    assert row["same_draw"] == row["same_argmax"] == 1.0 or not exact


def test_total_variation_is_half_of_the_differences() -> None:
    """Of two ids rounding takes away the difference of their weights, 16.5 and 16, and leaves that of their biases."""
    model = random_dit(2, vocab_size=3, mask_id=2, max_length=12)
    with torch.no_grad():
        model.head_weight.zero_()
        model.head_weight[:2, :2] = torch.tensor([[448.0, 16.5], [448.0, 16.0]])
        (row,) = measure_quality(model, torch.zeros(1, 12, dtype=torch.int64), [1.0])
        states, bias = model.hidden(torch.full((1, 12), 2)).double()[0], model.suppressed_bias().double()
    after = bias[0] - bias[1]
    apart = (0.5 * states[:, 1] + after).sigmoid() - after.sigmoid()
    assert row["variation"] == pytest.approx(float(apart.abs().mean()), rel=1e-4)
