"""The benchmark of the first call runs at a size for a CPU, so that it is there when a GPU is; its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_first_call as bench
from mdkern.engine import capture
from mdkern.kernels import compile_ahead


@pytest.mark.parametrize("case", ["the paper's size", "a Llama of 0.4 billion"])
def test_a_process_measures_its_calls(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (capture, compile_ahead):
        monkeypatch.setattr(module, "can_compile_ahead", lambda device: device.type == "cuda")
    row = bench.one_process(case, True, True)
    assert capture.can_compile_ahead(torch.device("cuda"))
    assert len(row["seconds"]) == bench.CALLS
    assert min(row["seconds"]) > 0.0
    bench.one_process(case, False, True)
    for module in (capture, compile_ahead):
        assert not module.can_compile_ahead(torch.device("cuda"))


def test_the_table_has_both_ways_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "KEPT", tmp_path / "first-call.json")
    assert bench.first_call() == bench.ABSENT
    kernels = [{"kernel": "a", "seconds": 1.25}, {"kernel": "b", "seconds": 2.5}]
    rows = [
        {"case": "one", "side_by_side": True, "seconds": [4.0, 0.2, 0.1], "kernels": kernels},
        {"case": "one", "side_by_side": False, "seconds": [9.0, 0.3, 0.3], "kernels": kernels},
        {"case": "two", "side_by_side": True, "seconds": [3.0, 1.0, 2.0], "kernels": []},
    ]
    content = {"environment": {"device": "a card", "torch": "2", "triton": "3", "cores": 16}, "rows": rows}
    assert bench.table(content).splitlines()[-2:] == [
        "| one | 4.0 | 9.0 | 0.10 | 2 | 3.8 |",
        "| two | 3.0 | – | 1.00 | 0 | – |",
    ]
