"""The paper setting's benchmark runs at a size for a CPU, and its sums are right, so that it is there when a GPU is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import paper_setting, paper_tables
from benchmarks.paper_setting import HEAVY, LIGHT, PARTS, Bench, Size, baseline, keep
from benchmarks.tick_trace import Kernel, split_ticks
from mdkern.profiling.profile import Setting, StepTimes

TINY = Size(
    setting=Setting(batch_size=2, length=16, steps=8),
    blocks=(2, 1),
    vocab_size=64,
    width=32,
    heads=2,
    longest=32,
    runs=1,
    steps=3,
    backend="eager",
)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """Every part, measured of two tiny models."""
    bench = Bench(TINY, "cpu")
    return {name: part(bench) for name, part in PARTS.items()}


@pytest.mark.slow
def test_every_part_can_be_kept_and_read_again(parts: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "paper-setting.json"
    for name, content in parts.items():
        keep(path, name, content, 1.0)
    kept = json.loads(path.read_text())["parts"]
    assert list(kept) == list(PARTS)
    assert all(kept[name] == parts[name] | {"took": 1.0} for name in PARTS)


def test_another_machine_starts_the_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "paper-setting.json"
    keep(path, "ours", {}, 1.0)
    monkeypatch.setattr(paper_setting, "environment", lambda: {"device": "another"})
    keep(path, "eager", {}, 1.0)
    assert list(json.loads(path.read_text())["parts"]) == ["eager"]


def test_baselines_are_extrapolated_from_their_median_step() -> None:
    kept = baseline(StepTimes(backbone=[1.0, 1.0, 1.0], head=[1.0, 2.0, 6.0], closing=0.5), steps=100)
    assert kept["milliseconds"]["step"] == 3000
    assert kept["run"] == 100 * 3.0 + 1.0 + 0.5
    assert kept["timed_steps"] == 3


@pytest.mark.slow
def test_light_steps_save_what_is_counted(parts: dict[str, Any]) -> None:
    rows = parts["savings"]["rows"]
    assert [row["share"] for row in rows] == [share / 10 for share in range(11)]
    saved = [row["flops_saved"] for row in rows]
    assert saved[0] == 0.0
    assert saved[-1] == max(saved)
    assert 0.3 < saved[-1] < 1.0  # one block of two, and the one in which less is to be done


@pytest.mark.slow
def test_settings_are_those_promised(parts: dict[str, Any]) -> None:
    shapes = {(row["batch_size"], row["length"], row["steps"]) for row in parts["other_sizes"]["rows"]}
    assert shapes == {(1, 16, 8), (2, 2, 8), (1, 32, 8), (2, 16, 1)}
    assert [row["samples"] for row in parts["scaling"]["rows"]] == [2, 3, 8, 32]


@pytest.mark.slow
def test_tables_and_plot(parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (HEAVY, LIGHT):  # what only a GPU's trace tells
        traced = {"tick_ms": 2.0, "backbone_ms": 1.0, "head_ms": 0.5, "idle_share": 0.1}
        memory = {"peak_allocated_mib": 1.0, "peak_reserved_mib": 2.0, "weights_mib": 3.0}
        parts["inside"][name] |= traced | memory
    times = {"default": [1.0, 2.0], "invariant": [2.0, 3.0], "ratio": 5 / 3}
    parts["invariant"] = {"rows": [{"batch_size": 2, "length": 16, "steps": 8} | times]}
    environment = {"device": "a card", "torch": "2", "triton": "3"}
    content = {"environment": environment, "parts": parts}
    monkeypatch.setattr(paper_tables, "load", lambda _: content)
    for table in paper_tables.TABLES.values():
        lines = [line for line in table().splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path)
    paper_tables.plot_savings()
    assert "<svg" in (tmp_path / "clock_follows_flops.svg").read_text()


def test_a_trace_is_split_into_backbone_head_and_idling() -> None:
    tick = [
        ("begin_tick_kernel", 0, 10),
        ("gemm", 10, 60),
        ("gemm", 70, 100),
        ("vocab_projection_kernel", 95, 120),
        ("end_tick_kernel", 120, 125),
    ]
    kernels = [Kernel("plan", -50, -20)]
    for number in range(3):
        kernels += [Kernel(name, 200 * number + start, 200 * number + end) for name, start, end in tick]
    found = split_ticks(kernels[::-1])
    assert found["ticks"] == 2
    assert found["tick_ms"] == pytest.approx(0.2)
    assert found["backbone_ms"] == pytest.approx(0.08)
    assert found["head_ms"] == pytest.approx(0.01 + 0.025 + 0.005)
    assert found["idle_share"] == pytest.approx(1 - (10 + 50 + 30 + 20 + 5) / 200)
    assert found["kernels_us"]["gemm"] == pytest.approx(80)


def test_random_weights_are_not_zeros() -> None:
    """A GPU multiplies zeros faster."""
    model = Bench(TINY, "cpu").full[HEAVY]
    assert all(bool((weight != 0).any()) for name, weight in model.named_parameters() if weight.ndim == 2)
    assert torch.equal(model.head_weight, Bench(TINY, "cpu").full[HEAVY].head_weight)


@pytest.mark.gpu
def test_every_part_runs_on_a_gpu() -> None:
    """With kernels, graphs, a trace and the allocator's statistics."""
    bench = Bench(replace(TINY, width=128), "cuda")
    parts = {name: part(bench) for name, part in PARTS.items()}
    for name in (HEAVY, LIGHT):
        traced = parts["inside"][name]
        assert traced["ticks"] > 2
        assert 0 < traced["head_ms"] < traced["tick_ms"]
        assert 0 < traced["backbone_ms"] < traced["tick_ms"]
        assert 0 <= traced["idle_share"] < 1
        assert traced["peak_allocated_mib"] > 0
