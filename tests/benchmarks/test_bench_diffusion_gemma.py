"""The benchmark of DiffusionGemma runs at a size for a CPU, so that it is there when a GPU is; its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_diffusion_gemma as bench
from benchmarks import report


def test_it_runs_and_keeps_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        pytest.skip("this version of transformers has no DiffusionGemma")
    monkeypatch.setattr(bench, "KEPT", tmp_path / "diffusion-gemma.json")
    monkeypatch.setattr(report, "load", lambda name: json.loads((tmp_path / f"{name}.json").read_text()))
    assert bench.diffusion_gemma() == bench.ABSENT
    assert list(report.compare_diffusion_gemma()) == []
    assert bench.main([str(tmp_path), "--tiny"]) == 0
    rows = json.loads((tmp_path / "diffusion-gemma.json").read_text())["rows"]
    assert [(row["way"], row["batch"], row["steps"], len(row["ms"])) for row in rows] == list(bench.TINY_CASES)
    (comparison,) = report.compare_diffusion_gemma()
    assert comparison.times == rows[0]["ms"][0] / rows[1]["ms"][0]


def test_a_row_has_both_ways_side_by_side() -> None:
    rows = [
        {"way": bench.OURS, "batch": 8, "ms": [10.0, 30.0, 20.0], "gib": 0.5},
        {"way": bench.THEIRS, "batch": 8, "ms": [50.0], "gib": 15.0},
        {"way": bench.OURS, "batch": 32, "ms": [99.0], "gib": 2.0},
    ]
    environment = {"device": "a card", "torch": "2", "triton": "3", "transformers": "5"}
    content = {"environment": environment, "sizes": bench.TRUE_SIZES, "canvas": 256, "prompt": 64, "rows": rows}
    assert bench.table(content).splitlines()[-2:] == [
        "| 8 | 20.0 | 50.0 | 2.5 × | 0.50 | 15.00 |",
        "| 32 | 99.0 | – | – | 2.00 | – |",
    ]
