"""The benchmark of precisions runs at a size for a CPU, so that it is there when a GPU is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_precision


@pytest.mark.slow
def test_it_runs_and_keeps_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_precision, "KEPT", tmp_path / "precision.json")
    assert bench_precision.precision() == bench_precision.ABSENT
    assert bench_precision.main([str(tmp_path), "--tiny"]) == 0
    content = json.loads((tmp_path / "precision.json").read_text())
    whole, *others = content["quality"]
    assert whole["precision"] == "float32"
    assert [row["precision"] for row in others] == ["fp8", bench_precision.ATTENTION]
    assert (whole["agreement"], whole["divergence"]) == (1.0, 0.0)
    assert others[0]["divergence"] != others[1]["divergence"]
    for rounded in others:
        assert 0.7 < rounded["agreement"] < 1.0
        assert 1e-4 < rounded["divergence"] < 0.05
        for measure in ("exact_nats", "bound_nats"):  # of the same texts, with the same masks
            assert rounded[measure] != whole[measure]
            assert rounded[measure] == pytest.approx(whole[measure], rel=0.03)
    assert set(content["speed"]["seconds"]) == {"bf16", "fp8"}
    assert bench_precision.precision().count("| fp8 |") == 2
