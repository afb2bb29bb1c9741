"""The benchmark of small passes runs at a size for a CPU, so that it is there when a GPU is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_small_passes


def test_it_runs_and_keeps_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_small_passes, "KEPT", tmp_path / "small-passes.json")
    assert bench_small_passes.small_passes() == bench_small_passes.ABSENT
    assert bench_small_passes.main([str(tmp_path), "--tiny"]) == 0
    content = json.loads((tmp_path / "small-passes.json").read_text())
    (one,) = content["passes"]
    assert set(one["ms"]) == {"mdkern", "an operator a launch", "the modules"}
    # Two texts of 16, of which the last block runs 4 rows: keys and values of all, the rest of 20 rows, width 64.
    products = 2 * 2 * 64 * 64 * 16 * 2 + 20 * (2 * 64 * 64 * 10 + 4 * 16 * 64)
    assert one["floor_ms"] == pytest.approx(1e3 * 2 * products / bench_small_passes.RATE)
    assert all(len(times) == 2 for times in content["runs"]["seconds"].values())
    assert "| a small one: 2 × 64 | 2 × 16 |" in bench_small_passes.small_passes()
