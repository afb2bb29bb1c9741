"""The benchmark of DiffusionGemma runs at a size for a CPU, so that it is there when a GPU is; its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_diffusion_gemma as bench
from benchmarks import report
from benchmarks.graph_profile import by_kind, kind_of


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
    wanted = [(way, batch, steps, rounds) for batch, steps, rounds, ways in bench.TINY_CASES for way in ways]
    assert [(row["way"], row["batch"], row["steps"], len(row["ms"])) for row in rows] == wanted
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


def test_a_way_that_fails_does_not_stop_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(2, 2)  # of which only the device is asked for

    def one_canvas(model: object, way: str, batch: int, steps: int) -> None:
        if way == bench.THEIRS:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "one_canvas", one_canvas)
    found = bench.measure_case(model, 8, 4, 2, (bench.THEIRS, bench.OURS))
    assert [(row["way"], len(row["ms"])) for row in found["rows"]] == [(bench.OURS, 2)]
    assert found["failed"] == ["transformers, 8 texts: OutOfMemoryError"]


def test_kernels_are_counted_by_kind() -> None:
    names = [
        "expert_product_kernel",
        "nvjet_tst_128x256",
        "vocab_projection_reduce_kernel",
        "pytorch_flash::fwd",
        "copy",
    ]
    rows = [{"kind": kind_of(name, bench.KINDS), "ms": 2.0**number} for number, name in enumerate(names)]
    sums = by_kind(rows, bench.KINDS)
    assert list(sums.values()) == [1.0, 4.0, 0.0, 8.0, 2.0, 0.0, 16.0]
    lines = bench.profile_table({"rows": [{"batch": 1, "profile": rows}, {"batch": 8}]}).splitlines()
    assert lines[1] == "| kernels, ms a step | 1 text |"
    assert lines[-1] == "| sum | 31.00 |"
