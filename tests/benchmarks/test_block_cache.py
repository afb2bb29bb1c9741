"""The block cache's benchmark runs at a size for a CPU, so that it is there when a GPU is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import block_cache


@pytest.mark.slow
def test_it_runs_and_keeps_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"broken": lambda: 1 / 0}
    monkeypatch.setattr(block_cache, "TINY_MODELS", {"DiT 2 x 64": block_cache.TINY_MODELS["DiT 2 x 64"]} | broken)
    monkeypatch.setattr(block_cache, "TINY_CASES", block_cache.TINY_CASES[:1])
    assert block_cache.main([str(tmp_path), "--tiny"]) == 1
    kept = json.loads((tmp_path / "block-cache.json").read_text())
    (row,) = kept["sampling"]
    assert row["same_tokens"] == 1.0
    assert row["by_cache"]["none"]["passes"] == row["by_cache"]["block"]["passes"] - row["by_cache"]["block"]["commits"]
    assert row["by_cache"]["block"]["commits"] == 7  # 2 blocks of the prompt, and 5 of the 6 that are written
    assert len(kept["passes"]) == 2
    content = block_cache.measure(tmp_path, tiny=True)
    assert content["failed"] == ["broken"]
    assert "failed: broken" in block_cache.table(content)
