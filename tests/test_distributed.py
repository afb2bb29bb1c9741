"""Sampling over several processes: the samples of one process, in their order, and nobody left waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import mdkern
from mdkern import DiT, DiTConfig, distributed, pretrained
from mdkern.cli import main as cli
from mdkern.distributed import sample_distributed, share
from mdkern.engine.resolve import resolve_seed
from mdkern.ranks import check_equal

LENGTH, VOCAB, MASK = 12, 40, 39


def pair() -> dict[str, DiT]:
    """Two small models that are the same in every process."""
    models = {}
    for name, blocks in (("H", 2), ("L", 1)):
        torch.manual_seed(blocks)
        config = DiTConfig(VOCAB, MASK, max_length=LENGTH, num_blocks=blocks, width=16, num_heads=2, tie_head=True)
        models[name] = DiT(config)
    return models


def prompts() -> dict[str, torch.Tensor]:
    """Five prompts of different lengths, padded."""
    ids = torch.full((5, LENGTH), MASK)
    mask = torch.ones_like(ids)
    for row in range(5):
        ids[row, : row + 1] = row
        mask[row, LENGTH - row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


USUAL: dict[str, Any] = {"schedule": "L3 H6 L3", "num_samples": 5, "length": LENGTH, "batch_size": 2, "progress": False}
SAME = {  # calls whose result must be that of one process
    "uneven shares": USUAL | {"seed": 3, "return_history": True},
    "fewer samples than ranks": USUAL | {"seed": 4, "num_samples": 1},
    "numbered samples": USUAL | {"seed": 5, "num_samples": 3, "sample_ids": [7, 0, 2**31]},
    "padded prompts": {"schedule": "L3 H6 L3", "seed": 6, "progress": False} | prompts(),
    "ragged blocks": {
        "schedule": "L3 H6 L3",
        "seed": 8,
        "progress": False,
        "decoder": "top_probability",
        "block_length": 3,
        "steps": 12,
        "cache": "dual",
    }
    | prompts(),
    "one model": {"num_samples": 4, "length": LENGTH, "steps": 5, "temperature": 0.5, "seed": 7},
}


def changed(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Calls that differ from `options` in one thing each, in such a way that sums and shapes stay the same."""
    usual = options | prompts()
    ids, mask = usual["input_ids"], usual["attention_mask"]
    swapped = pair()
    with torch.no_grad():
        swapped["L"].head_weight[[3, 4]] = swapped["L"].head_weight[[4, 3]]
    return {
        "input_ids": usual | {"input_ids": ids.roll(1, 0), "attention_mask": mask},
        "attention_mask": usual | {"attention_mask": mask.roll(1, 0)},
        "decoder": usual | {"decoder": mdkern.decoders.Threshold(0.6)},
        "sample_ids": usual | {"sample_ids": [0, 1, 2, 4, 3]},
        "model L": usual | {"models": swapped},
        "temperature": usual | {"temperature": 2.0},
        "seed": usual | {"seed": 12},
        "return_history": usual | {"return_history": True},
    }


def call(function: Any, options: dict[str, Any]) -> Any:
    options = dict(options)
    models = options.pop("models", None) or pair()
    return function(models if "schedule" in options else models["H"], **options)


COMPARED: dict[str, Any] = {
    "schedule": "L3 H6 L3",
    "decoder": mdkern.decoders.Threshold(0.5),
    "sample_ids": [0, 1, 2, 3, 4],
    "seed": 11,
    "progress": False,
}


def attempt(options: dict[str, Any]) -> Any:
    """What the call returns, or the error's name, its text and the seconds it took."""
    began = time.perf_counter()
    try:
        return call(sample_distributed, options)
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - began


def worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=100), world_size=ranks, rank=rank)
    results = {name: attempt(options) for name, options in SAME.items()}
    results["no seed"] = attempt(USUAL | {"generator": torch.Generator().manual_seed(rank)})
    results["bad input everywhere"] = attempt(USUAL | {"num_samples": 0})
    results["bad input on rank 1"] = attempt(USUAL | ({"length": 0} if rank == 1 else {}))
    results["different counts"] = attempt(USUAL | {"num_samples": 2 + rank})
    for name, options in changed(COMPARED).items():
        results[f"different {name}"] = attempt(options if rank == 1 else COMPARED | prompts())
    usual = distributed.Groups

    def failing(*_: Any, **__: Any) -> None:
        raise (FloatingPointError if rank == 1 else OSError)(f"failed on {rank}")

    if rank == 1:
        distributed.Groups = failing
    results["NaN on rank 1"] = attempt(USUAL)
    try:
        call(sample_distributed, USUAL | {"seed": 3})
    except Exception as error:
        results["finished on rank 0"] = error.partial
    distributed.Groups = usual
    results["and then a good call"] = attempt(SAME["uneven shares"])
    if rank == 1:
        time.sleep(3.0)
    results["late"] = attempt(USUAL | {"timeout": 1.0}) if rank == 0 else None
    torch.save(results, f"{folder}/{rank}.pt")
    if rank == 1:
        os._exit(7)  # dies without a word
    results["dead"] = attempt(USUAL | {"timeout": 5.0})
    torch.save(results, f"{folder}/{rank}.pt")
    os._exit(0)  # no farewell to a group whose other half is dead


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes got from each call."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = torch.multiprocessing.start_processes(worker, (2, str(folder)), nprocs=2, join=False)
    assert processes is not None
    for process in processes.processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes.processes] == [0, 7]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def check_same(ours: mdkern.SampleOutput, alone: mdkern.SampleOutput) -> None:
    assert torch.equal(ours.sequences, alone.sequences)
    assert list(ours.nfe) == list(alone.nfe)
    assert all(torch.equal(ours.nfe[name], alone.nfe[name]) for name in alone.nfe)
    assert torch.equal(ours.tokens_per_forward, alone.tokens_per_forward)
    assert torch.equal(ours.steps, alone.steps)
    assert ours.stop_reason == alone.stop_reason
    assert (ours.flops_saved, ours.seed) == (alone.flops_saved, alone.seed)
    assert set(ours.timings) == set(alone.timings)
    assert ours.timings["total"] >= max(seconds for name, seconds in ours.timings.items() if name != "total")
    assert (ours.history is None) == (alone.history is None)
    if alone.history is not None:
        assert torch.equal(ours.history.step, alone.history.step)
        assert torch.equal(ours.history.model, alone.history.model)
        assert ours.history.models == alone.history.models


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_every_rank_has_what_one_process_gives(results: list[dict[str, Any]], name: str) -> None:
    alone = call(mdkern.sample, SAME[name])
    for rank in range(2):
        check_same(results[rank][name], alone)


@pytest.mark.slow
def test_without_a_seed_rank_0_takes_one(results: list[dict[str, Any]]) -> None:
    first, second = (results[rank]["no seed"] for rank in range(2))
    assert first.seed == second.seed == resolve_seed(None, torch.Generator().manual_seed(0))
    check_same(first, call(mdkern.sample, USUAL | {"seed": first.seed}))
    assert torch.equal(first.sequences, second.sequences)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bad input everywhere", [("ValueError", "num_samples must be"), ("ValueError", "num_samples must be")]),
        ("bad input on rank 1", [("ValueError", "rank 1: length must be"), ("ValueError", "length must be")]),
        (
            "different counts",
            [("ValueError", "the arguments on rank 1 differ from those on rank 0 in input_ids, sample_ids")] * 2,
        ),
        ("NaN on rank 1", [("FloatingPointError", "rank 1: failed on 1"), ("FloatingPointError", "failed on 1")]),
    ],
)
def test_an_error_on_one_rank_is_told_on_all(
    results: list[dict[str, Any]], name: str, expected: list[tuple[str, str]]
) -> None:
    for rank, (kind, message) in enumerate(expected):
        found, text, _ = results[rank][name]
        assert found == kind
        assert text.startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("name", changed(COMPARED))
def test_whatever_differs_between_the_ranks_is_named(results: list[dict[str, Any]], name: str) -> None:
    for rank in range(2):
        kind, text, _ = results[rank][f"different {name}"]
        assert (kind, text) == ("ValueError", f"the arguments on rank 1 differ from those on rank 0 in {name}")


def test_all_ranks_that_differ_are_told() -> None:
    facts = [{"decoder": "a", "model H": "b"}] * 2 + [
        {"decoder": "c", "model H": "b"},
        {"decoder": "a", "model H": "d"},
    ]
    with pytest.raises(ValueError, match=r"on rank 2 differ from those on rank 0 in decoder; on rank 3 in model H$"):
        check_equal(facts)
    with pytest.raises(ValueError, match=r"; on 2 more ranks, too$"):
        check_equal([facts[0], *[facts[2]] * 6])


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), True, "60", None])
def test_a_timeout_that_cannot_be_is_refused(timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be a number of seconds"):
        call(sample_distributed, USUAL | {"timeout": timeout})


@pytest.mark.slow
def test_what_is_finished_on_any_rank_is_kept_on_all(results: list[dict[str, Any]]) -> None:
    """Rank 0 has two of the five samples, rank 1 failed."""
    alone = call(mdkern.sample, USUAL | {"seed": 3})
    for rank in range(2):
        partial = results[rank]["finished on rank 0"]
        assert partial.sample_ids.tolist() == [0, 1]
        assert torch.equal(partial.sequences, alone.sequences[:2])


@pytest.mark.slow
def test_the_group_is_of_use_after_an_error(results: list[dict[str, Any]]) -> None:
    check_same(results[0]["and then a good call"], results[0]["uneven shares"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("late", 3.0), ("dead", 10.0)])
def test_nobody_waits_for_long(results: list[dict[str, Any]], name: str, limit: float) -> None:
    kind, text, seconds = results[0][name]
    assert kind == "TimeoutError"
    assert "rank 0 lost another rank" in text
    assert seconds < limit


@pytest.mark.parametrize(("count", "ranks"), [(0, 1), (1, 4), (5, 2), (256, 3), (17, 8)])
def test_shares_cover_all_samples_evenly(count: int, ranks: int) -> None:
    shares = [list(range(count))[share(count, rank, ranks)] for rank in range(ranks)]
    assert [number for part in shares for number in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        call(sample_distributed, USUAL)


def test_the_commands_timeout_is_that_of_both_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[timedelta] = []
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(dist, name, lambda *_, timeout, **__: given.append(timeout))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    asked: list[float] = []
    original = distributed.torchrun_ranks
    monkeypatch.setattr(distributed, "torchrun_ranks", lambda timeout: asked.append(timeout) or original(timeout))
    monkeypatch.setattr("mdkern.cli.sample.prepare", lambda _: sys.exit(3))
    with pytest.raises(SystemExit):
        cli.main(["sample", "--timeout", "7.5"])
    assert asked == [7.5]
    assert given == [timedelta(seconds=7.5)] * 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command-line options that name a two-block and a one-block model with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, blocks in (("heavy", 2), ("light", 1)):
        torch.manual_seed(blocks)
        shape = {"max_length": LENGTH, "num_blocks": blocks, "width": 16, "num_heads": 2, "tie_head": True}
        DiT(DiTConfig(vocab_size=4096, mask_id=4095, eos_id=0, **shape)).save_pretrained(folder / name)
    options = {"--heavy": folder / "heavy", "--light": folder / "light", "--tokenizer": pretrained.FOLDER / "tokenizer"}
    return [str(part) for option in options.items() for part in option]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mdkern", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_command_line_under_torchrun(
    checkpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["sample", *checkpoints, "--device", "cpu", "--num-samples", "3", "--seed", "9", "--output"]
    assert cli.main([*options, str(tmp_path / "alone.jsonl")]) == 0
    alone = capsys.readouterr()
    several = torchrun(*options, str(tmp_path / "several.jsonl"))
    assert several.returncode == 0, several.stderr
    assert several.stdout == alone.out
    assert (tmp_path / "several.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()
    assert several.stderr.count("tokens/s") == 1
    assert "2 processes on cpu" in several.stderr


@pytest.mark.slow
def test_bad_input_under_torchrun_is_told_once(checkpoints: list[str]) -> None:
    found = torchrun("sample", *checkpoints, "--device", "cpu", "--schedule", "X9")
    assert found.returncode != 0
    assert found.stdout == ""
    assert found.stderr.count("mdkern: error: ") == 1
    assert "names X" in found.stderr
