"""The benchmark of people's models runs at a size for a CPU, so that it is there when a GPU is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_people, report


def test_floors_are_the_larger_of_arithmetic_and_memory() -> None:
    """A thousand million weights: 1 ms to read at 2 TB/s, and 1 ms of arithmetic for 50 columns at 100 TFLOP/s."""
    content = {"weights_of_blocks": 10**9, "rates": {"tflops": 100.0, "tb_per_second": 2.0}}
    assert bench_people.floor(content, 5) == pytest.approx(1.0)
    assert bench_people.floor(content, 50) == pytest.approx(1.0)
    assert bench_people.floor(content, 150) == pytest.approx(3.0)


def test_floors_in_fp8_read_half_as_much() -> None:
    rates = {"tflops": 100.0, "fp8_tflops": 400.0, "tb_per_second": 2.0}
    content = {"weights_of_blocks": 10**9, "rates": rates}
    assert bench_people.floor(content, 50, in_fp8=True) == pytest.approx(0.5)
    assert bench_people.floor(content, 200, in_fp8=True) == pytest.approx(1.0)


@pytest.mark.slow
def test_it_runs_and_keeps_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_people, "KEPT", tmp_path / "people.json")
    monkeypatch.setattr(report, "load", lambda name: json.loads((tmp_path / f"{name}.json").read_text()))
    assert bench_people.people() == bench_people.ABSENT
    assert list(report.compare_people()) == []
    assert bench_people.main([str(tmp_path), "--tiny"]) == 0
    content = json.loads((tmp_path / "people.json").read_text())
    assert content["how"].endswith("mdkern's own passes")
    assert "mdkern's own passes in fp8" in content["how_in_fp8"]
    ((run,), (one,)) = content["runs"], content["passes"]
    assert run["passes"] == {"none": 32, "dual": 32}
    assert set(run["seconds"]) == {
        "mdkern, none", "mdkern, dual", "fp8, none", "fp8, dual", "own forward, none", "own forward, dual",
        "plain loop",
    }  # fmt: skip
    assert all(0 <= same <= 1 for same in run["same_in_fp8"].values())
    assert one["differences"]["own forward"] < 1e-4 < one["differences"]["fp8"] < 0.3
    assert one["columns"] == {"whole": 192, "window": 64}
    width, inside = 64, 64
    kept = 2 * width * width + 2 * width * width // 2 + 3 * width * inside + 2 * width  # two kv heads of four
    assert content["weights_of_blocks"] == 2 * kept
    assert len(list(report.compare_people())) == 2 * (2 + 4)
    assert bench_people.people().count("\n| 2 × (32 + 64) |") == 4
