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
    ways = row["by_window"]
    assert all(way["same_tokens"] == 1.0 for way in ways.values())
    assert len({way["passes"] - way["commits"] for way in ways.values()}) == 1
    # 2 blocks of the prompt, and 5 of the 6 that are written; those 2 in one pass, and none.
    assert {blocks: way["commits"] for blocks, way in ways.items()} == {"0": 0, "1": 7, "2": 1}
    assert len(kept["passes"]) == 2
    content = block_cache.measure(tmp_path, tiny=True)
    assert content["failed"] == ["broken"]
    assert "failed: broken" in block_cache.table(content)
