"""The README is true: its Python runs as pasted (at smaller sizes), its tables are those of the results."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report

README = (Path(__file__).parent.parent / "README.md").read_text()
SMALLER = {
    r"num_samples=\d+": "num_samples=2",
    r"length=256, steps=256": "length=32, steps=32",
    r"L32 H192 L32": "L4 H24 L4",
    r"50258": "517",
    r"50257": "516",
}


def test_every_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3

    def function(input_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*input_ids.shape, 517)

    names: dict[str, Any] = {"function": function}
    for block in blocks:
        for pattern, smaller in SMALLER.items():
            block = re.sub(pattern, smaller, block)
        with pytest.warns() if "adapt(" in block else pytest.MonkeyPatch.context():
            exec(compile(block, "README.md", "exec"), names)
        assert names["out"].sequences.ndim == 2
    assert "of the FLOPs saved" in capsys.readouterr().out


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    assert report.main() == 0, "python -m benchmarks.report redraws them"


def test_every_named_file_is_there() -> None:
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link
