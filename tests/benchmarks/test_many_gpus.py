"""The measurements of several GPUs, small, on two CPU processes: what they say about correctness holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_tables, kernel_tables, many_gpus
from benchmarks.bench_distributed import counts_up_to, describe

pytestmark = pytest.mark.skipif(many_gpus.torch.cuda.is_available(), reason="has its CPU form only")


def test_numbers_of_gpus_double_up_to_all() -> None:
    assert [counts_up_to(most) for most in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]


def test_lost_time_adds_up() -> None:
    """Two GPUs take 6 s instead of 5, of which half a second is spent on exchanges."""
    found = {1: {"seconds": [10.0], "share": [9.9], "same": 1.0}, 2: {"seconds": [6.0], "share": [5.5], "same": 1.0}}
    run = describe(found, 30)["2"]
    assert run["samples_per_second"] == 5.0
    assert run["efficiency"] == pytest.approx(5 / 6)
    assert (run["shares"], run["exchange"]) == (0.5, 0.5)


@pytest.mark.slow
def test_samples_and_tokens_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert many_gpus.main(["--size", "tiny", "--out", str(tmp_path), "--parts", "sampling", "sharded"]) == 0
    runs = json.loads((tmp_path / "distributed.json").read_text())["runs"]
    assert [run["same"] for run in runs.values()] == [1.0, 1.0]
    table = json.loads((tmp_path / "sharded.json").read_text())["table"]
    assert [row["tokens_differing"] for row in table] == [{"2": 0}] * 2
    assert all(row["logsumexp_difference"]["2"] < 1e-5 for row in table)
    monkeypatch.setattr(kernel_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(kernel_tables, "caption", lambda content: "here")
    monkeypatch.setattr(gpu_tables, "caption", lambda content: "here")
    assert "| 2 |" in gpu_tables.distributed()
    assert "| 5 |" in gpu_tables.sharded()
    assert "338" in gpu_tables.published()


@pytest.mark.slow
def test_training_and_search_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--size", "tiny", "--out", str(tmp_path), "--parts", "training", "search"]
    assert many_gpus.main(command) == 0
    found = json.loads((tmp_path / "training-gpus.json").read_text())
    assert found["killed_at_step"] is not None
    assert 0 < found["resumed_at_step"] < found["steps"]
    assert found["largest_relative_difference_of_losses"] < 1e-4
    found = json.loads((tmp_path / "search-gpus.json").read_text())
    assert found["schedules"] == found["same_scores"] == 6
    monkeypatch.setattr(kernel_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_tables, "caption", lambda content: "here")
    assert "was killed after step" in gpu_tables.training()
    assert "6 schedules" in gpu_tables.search()
    capsys.readouterr()
    assert many_gpus.main(command) == 0  # at once
    assert "done already: alone, training, search" in capsys.readouterr().out


def test_a_part_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such GPU")

    works = lambda *_: {"table": []}  # noqa: E731
    parts = {"sampling": (broken, "distributed.json"), "sharded": (works, "sharded.json")}
    monkeypatch.setattr(many_gpus, "PARTS", many_gpus.PARTS | parts)
    command = ["--size", "tiny", "--out", str(tmp_path), "--parts", "sampling", "sharded"]
    assert many_gpus.main(command) == 1
    printed = capsys.readouterr()
    assert "no such GPU" in printed.err
    assert "failed: sampling" in printed.out
    assert json.loads((tmp_path / "many-gpus.json").read_text())["done"] == {"sharded": "sharded.json"}


def test_the_full_size_wants_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        many_gpus.main(["--out", str(tmp_path)])
    assert "--size tiny" in capsys.readouterr().err
