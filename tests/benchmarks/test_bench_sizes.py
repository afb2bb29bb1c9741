"""The benchmark of models of true size runs at a size for a CPU, so that it is there when a GPU is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_sizes, evaluation_loop, published, report, true_sizes
from benchmarks.true_sizes import CACHED, OURS, THEIRS


def part(rows: list[tuple[str, int, float]]) -> dict[str, Any]:
    named = [
        {"way": way, "batch": batch, "tokens_per_second": speed, "passes": 64, "bytes_above_weights": 2**29}
        for way, batch, speed in rows
    ]
    known = {"device": "a card", "torch": "2", "triton": "3", "transformers": "5"}
    return {
        "environment": known, "label": "A model", "rule": "a rule", "written": 64, "skipped": None, "rows": named,
        "failed": [],
    }  # fmt: skip


def test_a_loop_for_one_text_is_as_fast_with_eight() -> None:
    found = part([(OURS, 1, 200.0), (THEIRS, 1, 100.0), (OURS, 8, 900.0)])
    assert [times for *_, times in bench_sizes.pairs(found)] == [pytest.approx(1 / 2), pytest.approx(1 / 9)]
    text = bench_sizes.table({"parts": {"sdar": found}})
    assert f"|  | 8 | {OURS} | 64 | 900 | 9.0 | 0.50 |" in text


def test_a_loop_for_many_texts_is_compared_at_as_many() -> None:
    found = part([(OURS, 8, 900.0), (THEIRS, 1, 100.0), (THEIRS, 8, 450.0)])
    ((work, ours, theirs, place, times),) = bench_sizes.pairs(found)
    assert (work, ours, theirs, place, times) == ("A model", OURS, THEIRS, "8 texts", pytest.approx(1 / 2))


def test_evaluations_are_compared_by_kind() -> None:
    rows = [("generate_until", evaluation_loop.OURS, 2.0), ("generate_until", evaluation_loop.THEIRS, 8.0),
            ("loglikelihood", evaluation_loop.OURS, 1.0)]  # fmt: skip
    found = {"requests": 16, "rows": [{"kind": kind, "way": way, "seconds": took} for kind, way, took in rows]}
    ((work, _, _, _, times),) = bench_sizes.pairs(found)
    assert (work, times) == ("LLaDA-8B, generate_until", pytest.approx(1 / 4))


def test_words_are_tokens() -> None:
    tokenizer = evaluation_loop.tokenizer_of(50)
    asked = evaluation_loop.requests_of(3, 50, 8)
    for request in asked["loglikelihood"]:
        context, continuation = request.args
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        assert [f"t{number}" for number in ids] == (context + continuation).split()
    assert len(asked["generate_until"]) == 3


def test_stand_ins_are_flash_attention_and_norm_as_they_are_defined() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 5, heads, 8, generator=generator) for heads in (4, 2, 2))
    found = published.attention(query, key, value, causal=False, softmax_scale=0.3)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(2, dim=2)).mul(0.3).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("bhqk,bkhd->bqhd", weights, value.repeat_interleave(2, dim=2)))
    scale = torch.rand(8, generator=generator)
    expected = query * scale / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(published.rms_norm(query, scale), expected)
    torch.testing.assert_close(published.join_heads(query, "b l h d -> b l (h d)"), query.reshape(2, 5, 32))
    with pytest.raises(ValueError, match="install einops"):
        published.join_heads(query, "b l d -> b d l")


def test_missing_code_is_named(tmp_path: Path) -> None:
    assert "--peers" in str(published.missing(None, "dream"))
    (tmp_path / "llada").mkdir()
    (tmp_path / "llada" / "modeling_llada.py").touch()
    found = published.missing(tmp_path, "llada", "generate.py")
    assert found is not None
    assert found.endswith("has no configuration_llada.py, generate.py")


def test_scripts_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for family in ("llada", "sdar"):
        (tmp_path / family).mkdir()
        (tmp_path / family / "same_name.py").write_text(f"whose = {family!r}\n")
        (tmp_path / family / "script.py").write_text("from same_name import whose\n")
    assert [published.load(tmp_path, family, "script").whose for family in ("sdar", "llada")] == ["sdar", "llada"]


@pytest.mark.slow
def test_it_runs_without_the_authors_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sizes, "KEPT", tmp_path / "sizes.json")
    monkeypatch.setattr(report, "load", lambda name: json.loads((tmp_path / f"{name}.json").read_text()))
    monkeypatch.setattr(bench_sizes, "BATCHES", (1,))
    monkeypatch.setattr(bench_sizes, "GIVEN", 32)
    short = bench_sizes.Family("LLaDA", true_sizes.llada, 32, "a rule")
    monkeypatch.setitem(bench_sizes.FAMILIES, "llada", short)
    assert bench_sizes.sizes() == bench_sizes.ABSENT
    assert list(report.compare_sizes()) == []
    command = [str(tmp_path), "--size", "tiny", "--parts"]
    assert bench_sizes.main([*command, "llada", "dream"]) == 0
    parts = json.loads((tmp_path / "sizes.json").read_text())["parts"]
    assert {row["way"]: row["passes"] for row in parts["llada"]["rows"]} == {OURS: 32, f"{CACHED} dual": 32}
    assert "--peers" in parts["llada"]["skipped"]
    assert "transformers has no class" in parts["dream"]["skipped"]
    assert "LLaDA: no folder" in bench_sizes.sizes()

    def broken(peers: Path | None, tiny: bool) -> bench_sizes.Subject:
        raise ZeroDivisionError

    monkeypatch.setitem(bench_sizes.FAMILIES, "sdar", bench_sizes.Family("SDAR", broken, 32, "a rule"))
    assert bench_sizes.main([*command, "sdar"]) == 1
    kept = json.loads((tmp_path / "sizes.json").read_text())["parts"]
    assert kept["llada"] == parts["llada"]
    assert "ZeroDivisionError" in kept["sdar"]["failed"][0]
    with pytest.raises(SystemExit, match="another folder"):
        bench_sizes.main([str(tmp_path), "--parts", "dream"])
