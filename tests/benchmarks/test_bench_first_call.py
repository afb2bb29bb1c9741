"""The benchmark of the first call runs at a size for a CPU, so that it is there when a GPU is; its table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_first_call as bench
from mdkern.engine import capture, graphs
from mdkern.kernels import compile_ahead
from mdkern.models.hf import pass_trial


@pytest.mark.parametrize("part", ["paper", "llama"])
def test_a_process_measures_its_calls(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (capture, compile_ahead):
        monkeypatch.setattr(module, "can_compile_ahead", lambda device: device.type == "cuda")
    for module, name in (
        (pass_trial, "rehearse_once"),
        (graphs, "rehearse"),
        (graphs, "capture"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # puts it back
    row = bench.one_process(part, True)
    assert capture.can_compile_ahead(torch.device("cuda"))
    assert len(row["seconds"]) == bench.CALLS
    assert min(row["seconds"]) > 0.0
    assert sum(row["phases"].values()) == pytest.approx(row["seconds"][0])
    assert (row["phases"]["kernels that a model is tried with"] > 0.0) == (part == "llama")
    bench.one_process("paper-one-by-one", True)
    for module in (capture, compile_ahead):
        assert not module.can_compile_ahead(torch.device("cuda"))


def test_the_clock_counts_what_is_outermost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 10.0, 14.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    owner = SimpleNamespace(inner=lambda value: value + 1)
    owner.outer = lambda value: owner.inner(value) * 2
    clock = bench.Clock()
    clock.watch(owner, "inner", "a")
    clock.watch(owner, "outer", "b")
    assert (owner.inner(1), owner.outer(1)) == (2, 4)
    assert clock.spent == {"a": 1.0, "b": 4.0}


@pytest.mark.slow
def test_parts_are_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "KEPT", tmp_path / "first-call.json")
    assert bench.first_call() == bench.ABSENT
    assert bench.main([str(tmp_path), "--tiny", "--parts", "paper"]) == 0
    row = json.loads((tmp_path / "first-call.json").read_text())["paper"]
    assert row["start"] > 0.1  # seconds: it has imported PyTorch
    assert "| the paper's size |" in bench.first_call()


def test_the_table_tells_what_the_first_call_waits_for() -> None:
    kernels = [{"kernel": "a", "seconds": 1.25, "python": 0.5}, {"kernel": "b", "seconds": 2.5, "python": 0.25}]

    def row(case: str, beside: bool, seconds: list[float], **phases: float) -> dict[str, Any]:
        return {"case": case, "side_by_side": beside, "seconds": seconds, "phases": phases, "kernels": kernels}

    content = {
        "environment": {"device": "a card", "torch": "2", "triton": "3", "cores": 16},
        "paper": row("one", True, [4.0, 0.2, 0.1], compiling=3.0, rest=1.0),
        "paper-one-by-one": row("two", False, [9.0, 1.0, 2.0], rest=9.0),
    }
    assert bench.table(content).splitlines()[-4:] == [
        "| model | first call | of it compiling | of it rest | later call | kernels | of the compiler (translating from"
        " Python) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| one | 4.0 | 3.0 | 1.0 | 0.10 | 2 |  |",
        "| two | 9.0 | 0.0 | 9.0 | 1.00 | 2 | 3.8 (0.8) |",
    ]
