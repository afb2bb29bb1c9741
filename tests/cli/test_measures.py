"""``mdkern evaluate`` and ``mdkern importance`` on the shipped pair: what they print, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mdkern import DiT, likelihood, load_pair
from mdkern.cli import main as cli
from mdkern.decoders import Threshold
from mdkern.evaluation import importance as importance_module
from mdkern.evaluation import likelihood as likelihood_module
from mdkern.evaluation import text as text_module
from mdkern.evaluation.corpus import windows

SENTENCE = "It was a dark and stormy night, and the rain fell in torrents upon the house. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SENTENCE * 8)
    return path


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge")
    GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_positions=32, n_embd=8, n_layer=1, n_head=1)).save_pretrained(path)
    return path


def test_a_schedule_is_evaluated_on_text_and_on_samples(
    text: Path, judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"evaluate --data {text} --texts 2 --masks 2 --num-samples 3 --length 16 --steps 8 --judge {judge} --json"
    assert cli.main([*line.split(), "--schedule", "L2 H6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held-out text, windows"] == 2
    low, high = found["bound, nats a token"]["interval_95"]
    assert low < found["bound, nats a token"]["mean"] < high
    assert found["judge, nats a token"]["mean"] == pytest.approx(torch.log(torch.tensor(4096.0)).item(), rel=0.05)
    assert found["generative perplexity"] == pytest.approx(4096, rel=0.3)  # a judge that knows nothing
    assert set(found["passes a sample"]) == {"L", "H"}
    assert 0 < found["distinct-1"] <= 1


def test_the_exact_likelihood_is_that_of_the_decoder(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `mdkern.likelihood` gives it, of the windows and the settings of the command line."""
    line = f"evaluate --data {text} --texts 2 --masks 1 --num-samples 0 --length 16 --exact --by top1 --json"
    rule = "--schedule L2H2 --block-length 8 --steps 4 --decoder threshold:threshold=0.3"
    assert cli.main([*line.split(), *rule.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    heavy, light, tokenizer = load_pair()
    ids = windows(text, tokenizer, 16, 2)
    options = {"method": "decoder", "decoder": Threshold(0.3), "by": "top1", "block_length": 8, "steps": 4}
    exact = likelihood(heavy, light, "L2H2", input_ids=ids, **options)
    nats = exact.nats / exact.tokens
    assert found["exact, nats a token"]["mean"] == pytest.approx(float(nats.mean()), rel=1e-5)
    low, high = found["exact, nats a token"]["interval_95"]
    assert high - low == pytest.approx(2 * 1.959964 * float(nats.std()) / 2**0.5, rel=1e-3)
    assert found["exact, passes a text"]["L"] > 0


def test_importance_is_a_table_and_a_picture(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"importance --data {text} --texts 3 --times 2 --length 16 --path-samples 2 --segments 2"
    assert cli.main([*line.split(), "--plot", str(tmp_path / "importance.png")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["t or steps"] for row in rows if row["measure"] == "KL"] == ["0.2500", "0.7500"]
    assert [row["t or steps"] for row in rows if row["measure"].endswith("revealed")] == ["0-8", "8-16"]
    assert all(float(row["mean"]) >= 0 for row in rows)
    assert (tmp_path / "importance.png").stat().st_size > 1000


class StopError(Exception):
    """As if Ctrl-C came."""


def stopping(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> list[int]:
    """Let a function stop the command at a call, and count its calls; it does what it did before otherwise."""
    count, plain = [0], getattr(module, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            raise StopError
        return plain(*arguments, **options)

    monkeypatch.setattr(module, name, counted)
    return count


def test_importance_goes_on_where_it_was_stopped(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"importance --data {text} --texts 3 --times 3 --length 16 --path-samples 2 --segments 2".split()
    whole, parts, partial = (tmp_path / name for name in ("whole.csv", "parts.csv", "parts.csv.partial"))
    assert cli.main([*line, "--output", str(whole)]) == 0
    for function, calls in (("at_time", 2), ("path_kl", 2)):
        with monkeypatch.context() as patch:
            stopping(patch, importance_module, function, calls)
            with pytest.raises(StopError):
                cli.main([*line, "--output", str(parts)])
    assert not parts.exists()
    assert len(partial.read_text().splitlines()) == 1 + 3 + 1  # the times and a segment
    with partial.open("a") as file:
        file.write('{"name": "segment 1", "val')  # cut off
    count = stopping(monkeypatch, importance_module, "at_time", 0)
    assert cli.main([*line, "--output", str(parts)]) == 0
    assert (count[0], parts.read_text(), partial.exists()) == (0, whole.read_text(), False)
    partial.write_text('{"setting": "another"}\n')
    assert cli.main([*line, "--output", str(parts)]) == 2


def test_evaluation_goes_on_where_it_was_stopped(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"evaluate --data {text} --texts 2 --masks 1 --num-samples 2 --length 16 --exact --decoder margin".split()
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert cli.main([*line, "--output", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stopping(patch, text_module, "token_entropy", 1)
        with pytest.raises(StopError):
            cli.main([*line, "--output", str(parts)])
    count = stopping(monkeypatch, likelihood_module, "likelihood", 0)
    assert cli.main([*line, "--output", str(parts)]) == 0
    assert (count[0], json.loads(parts.read_text())) == (0, json.loads(whole.read_text()))
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == ["parts.json"]


def test_a_search_goes_on_and_takes_over_what_other_processes_left(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, part = tmp_path / "search.jsonl", tmp_path / "search.jsonl.rank1"
    line = f"search --judge {judge} --segments 2 --light-segments 1 --num-samples 2 --length 8 --steps 4 --top 1"
    command = [*line.split(), "--output", str(output)]
    assert cli.main([*command, "--plot", str(tmp_path / "search.svg")]) == 0
    assert "<svg" in (tmp_path / "search.svg").read_text()
    printed, told = capsys.readouterr()
    assert printed.startswith("2 schedules, 2 samples each")
    assert "mdkern: 2 schedules" in told
    setting, first, second = output.read_text().splitlines(keepends=True)
    output.write_text(setting + first)
    part.write_text(setting + second)  # as an interrupted run of two processes leaves them
    assert cli.main(command) == 0
    again, told = capsys.readouterr()
    assert again == printed
    assert "mdkern: 2 schedules" not in told  # nothing was run
    assert not part.exists()
    assert {json.loads(line)["models"][0] for line in output.read_text().splitlines()[1:]} == {"H", "L"}
    part.write_text("")  # as a process leaves it that was killed at once
    assert cli.main(command) == 0
    part.write_text(setting.replace('"seed": 0', '"seed": 1').replace('"digest": "', '"digest": "0') + second)
    assert cli.main(command) == 2
    assert "search.jsonl.rank1 is of another search (it differs in seed)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate --num-samples 0", "nothing to measure"),
        ("evaluate --num-samples -1", "at least 0"),
        ("evaluate --judge-tokenizer x", "goes with --judge"),
        ("evaluate --exact", "--exact needs --data"),
        ("evaluate --by top1", "goes with --exact"),
        ("evaluate --data nowhere.txt --exact --top-k 5", "without --top-k"),
        ("evaluate --data nowhere.txt --exact --block-length 8 --cache dual", "without --cache"),
        ("evaluate --num-samples 1 --length 8 --judge nowhere", "not a folder"),
        ("evaluate --num-samples 0 --data nowhere.txt", "not a file"),
        ("evaluate --num-samples 1 --length 8 --masks 4", "--masks goes with --data"),
        ("evaluate --num-samples 1 --length 8 --texts 4", "--texts goes with --data"),
        ("evaluate --num-samples 0 --data README.md --judge judge", "--judge is about samples, of which"),
        ("evaluate --num-samples 0 --data README.md --top-k 5", "--top-k is about samples"),
        ("evaluate --num-samples 0 --data README.md --decoder margin", "--decoder is about samples"),
        ("importance --data README.md --path-samples 0 --segments 4", "--segments goes with --path-samples"),
        ("importance --data README.md --length 8 --segments 9", "segments must be at most the 8 steps, not 9"),
        ("search --judge nowhere --output s.jsonl --length 8 --segments 9", "segments must be at most the 8 steps"),
        ("search --judge nowhere --output s.jsonl --segments 60", "487,635 schedules, and at most 100,000"),
        ("importance --data nowhere.txt", "not a file"),
        ("importance --data nowhere.txt --plot picture.txt", "must end in"),
        ("importance --data nowhere.txt --path-samples -1", "at least 0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any pass of a model."""
    monkeypatch.setattr(DiT, "hidden", lambda *_: pytest.fail("a model was run"))
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err
