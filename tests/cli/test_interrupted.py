"""``mdkern sample``, interrupted: what was finished is printed, kept, and gone on from. Files stay private."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mdkern
from mdkern import DiT, DiTConfig, pretrained
from mdkern.cli import main as cli
from mdkern.cli.records import SampleFile
from training.pairs import read_pairs

LENGTH = 12
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A one-block model with the shipped tokenizer's vocabulary, as command-line options."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    shape = {"max_length": LENGTH, "num_blocks": 1, "width": 16, "num_heads": 2, "tie_head": True}
    DiT(DiTConfig(vocab_size=4096, mask_id=4095, eos_id=0, **shape)).save_pretrained(folder)
    return ["--heavy", str(folder), "--tokenizer", str(pretrained.FOLDER / "tokenizer"), "--device", "cpu"]


@pytest.fixture
def run(checkpoint: list[str], capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``mdkern sample``: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["sample", *checkpoint, *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def stop_after(groups: int, error: BaseException, partial: bool = False) -> Callable[..., Iterator[Any]]:
    """`sample_groups`, one sample a group, that fails after some; with `partial` one more is finished and not given."""
    original = mdkern.sample_groups

    def stopping(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, output in enumerate(original(*arguments, **options, group_size=1)):
            if number == groups:
                if partial:
                    error.partial = output  # type: ignore[attr-defined]
                raise error
            yield output

    return stopping


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


MEMORY = "mdkern: error: out of memory: lower --batch-size, --length or --num-samples"
FAILURES = {
    "interrupt": (KeyboardInterrupt(), 130, "mdkern: interrupted"),
    "NaN": (FloatingPointError("logits are NaN"), 1, "mdkern: error: logits are NaN"),
    "memory": (torch.OutOfMemoryError("CUDA"), 1, MEMORY),
    "memory of the host": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, MEMORY),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_was_finished_is_kept_and_gone_on_from(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The whole file in the end, and the texts printed by the two runs, are those of a run that was not interrupted."""
    error, expected_code, message = FAILURES[name]
    target, partial, whole = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial", tmp_path / "whole.jsonl"
    options = ["--num-samples", "5", "--quiet", "--output", str(target)]
    monkeypatch.setattr("mdkern.sampling.sample_groups", stop_after(2, error, partial=True))
    code, first, err = run(*options, "--seed", "3")
    assert code == expected_code
    assert err == f"{message}; 3 finished samples are in {partial}, from which --resume goes on\n"
    assert not target.exists()
    assert [line.get("sample") for line in lines(partial)] == [None, 0, 1, 2]
    monkeypatch.undo()

    code, _, err = run(*options, "--seed", "3")  # as if nothing had been
    assert code == 2
    assert "go on with --resume, or delete it" in err
    code, second, _ = run(*options, "--resume")  # its seed is known
    assert code == 0
    assert not partial.exists()
    _, alone, _ = run("--num-samples", "5", "--quiet", "--output", str(whole), "--seed", "3")
    assert target.read_text() == whole.read_text()
    assert first + "\n" + second == alone


def test_finished_samples_are_there_while_others_are_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "out.jsonl.partial"
    seen = []
    original = mdkern.sample_groups

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for output in original(*arguments, **options, group_size=2):
            yield output
            seen.append((len(lines(partial)) - 1, capsys.readouterr().out.count("--- sample ")))

    monkeypatch.setattr("mdkern.sampling.sample_groups", watched)
    assert run("--num-samples", "6", "--output", str(tmp_path / "out.jsonl"))[0] == 0
    assert seen == [(2, 2), (4, 2), (6, 2)]


def test_another_request_does_not_go_on_from_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--num-samples", "3", "--output", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr("mdkern.sampling.sample_groups", stop_after(1, KeyboardInterrupt()))
    run(*options, "--seed", "3", "--top-k", "9")
    monkeypatch.undo()
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    code, out, err = run(*options, "--resume", "--temperature", "0.5", "--prompt", "She", "--decoder", "margin")
    assert (code, out) == (2, "")
    assert "was begun with other settings (--decoder, --temperature, --top-k, the prompt)" in err
    code, out, err = run(*options, "--resume", "--seed", "4", "--top-k", "9")
    assert (code, out) == (2, "")
    assert "--seed 4" in err
    assert "was begun with seed 3" in err
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{}\n", b"a text\n", b"[1]\n", b"\xff\n"])
def test_a_file_of_others_is_not_taken_for_ours(run: Run, tmp_path: Path, content: bytes) -> None:
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(content)
    code, _, err = run("--output", str(tmp_path / "out.jsonl"), "--resume")
    assert code == 2
    assert "is not what an interrupted run leaves" in err
    assert partial.read_bytes() == content


def test_a_line_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    target, request = tmp_path / "out.jsonl", {"a": 1}
    file = SampleFile(target, request, 7)
    file.append({"sample": 1, "text": "b"}, {"sample": 0, "text": "a"})
    file.file.write(b'{"sample": 2, "te')  # killed
    file.file.close()
    again = SampleFile(target, request, 8)
    assert (again.seed, sorted(again.places)) == (7, [0, 1])
    again.append({"sample": 2, "text": "c"})
    again.finish(range(3))
    assert [line["text"] for line in lines(target)] == ["a", "b", "c"]


def test_a_run_that_finished_nothing_is_begun_anew(run: Run, tmp_path: Path) -> None:
    """As one that was killed before its first sample: neither its seed nor its settings matter."""
    target = tmp_path / "out.jsonl"
    SampleFile(target, {"a": 1}, 7).file.close()
    assert run("--output", str(target), "--seed", "3")[0] == 0
    assert lines(target)[0]["seed"] == 3


def test_two_processes_do_not_write_one_file(run: Run, tmp_path: Path) -> None:
    with SampleFile(tmp_path / "out.jsonl", {"a": 1}, 7):
        code, _, err = run("--output", str(tmp_path / "out.jsonl"))
    assert code == 2
    assert "out.jsonl.partial is being written by another process" in err


def test_a_full_disk_keeps_what_it_holds(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples whose record could not be written are printed all the same."""
    monkeypatch.setattr("mdkern.sampling.sample_groups", stop_after(9, KeyboardInterrupt()))
    original, calls = os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 4:  # the request, two samples, and then
            raise OSError(errno.ENOSPC, "No space left on device")
        original(number)

    monkeypatch.setattr("os.fsync", full)
    code, out, err = run("--num-samples", "5", "--quiet", "--output", str(tmp_path / "out.jsonl"))
    assert code == 1
    assert out.count("--- sample ") == 3
    partial = tmp_path / "out.jsonl.partial"
    assert err == (
        f"mdkern: error: {partial}: No space left on device; 2 finished samples are in {partial}, from which --resume "
        "goes on\n"
    )


def test_permissions_and_links_stay(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private file is private at every moment, and a link leads to where it led."""
    files = {"--output": tmp_path / "out.jsonl", "--trace": tmp_path / "trace.html"}
    modes: list[int] = []
    original = os.fsync
    monkeypatch.setattr("os.fsync", lambda number: modes.append(os.fstat(number).st_mode) or original(number))
    for path in files.values():
        path.write_text("old")
        path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(files["--output"])
    assert run("--output", str(link), "--trace", str(files["--trace"]))[0] == 0
    assert link.is_symlink()
    assert len(modes) == 4  # the partial file twice, the two files
    assert {stat.S_IMODE(mode) for mode in modes} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    assert all(path.read_text() != "old" for path in files.values())


def test_a_new_file_has_the_usual_permissions(run: Run, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        assert run("--output", str(tmp_path / "out.jsonl"))[0] == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == 0o640


def test_targets_that_cannot_be_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "same").hardlink_to((tmp_path / "file", (tmp_path / "file").touch())[0])
    cases = {
        "leads in a circle": ["--output", str(tmp_path / "one")],
        "File name too long": ["--output", str(tmp_path / ("n" * 300))],
        "are the same file": ["--output", str(tmp_path / "file"), "--trace", str(tmp_path / "same")],
        "embedded null byte": ["--output", "a\0b"],
    }
    for message, options in cases.items():
        code, out, err = run(*options)
        assert (code, out, err.count("\n")) == (2, "", 1), message
        assert message in err


def test_a_prompt_file_is_continued_or_its_encoding_named(run: Run, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("café ", encoding="utf-8-sig")
    code, out, _ = run("--prompt-file", str(prompt), "--quiet")
    assert code == 0
    assert out.startswith("café ")
    prompt.write_text("café", encoding="latin-1")
    code, _, err = run("--prompt-file", str(prompt))
    assert code == 2
    assert "is not UTF-8 (byte 3 is 0xe9)" in err


def test_a_file_of_prompts_gives_pairs_and_is_gone_on_from(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what each prompt gives by itself, and what fine-tuning reads."""
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    texts = ["Once upon", "It was", "He said that"]
    prompts.write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in texts))
    command = ["--prompts", str(prompts), "--output", str(pairs), "--seed", "3", "--temperature", "0", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr("mdkern.sampling.sample_groups", stop_after(1, KeyboardInterrupt()))
        assert run(*command)[0] == 130
    assert not pairs.exists()
    code, _, err = run(*command[:-1], "--resume")
    assert code == 0
    assert "2 x 12 tokens" in err
    assert "for their own number of steps" in err
    records = lines(pairs)
    assert [record["prompt"] for record in records] == texts
    for record in records:
        assert record["prompt_ids"] + record["response_ids"] == record["token_ids"]
        assert record["text"] == record["prompt"] + record["response"]
        assert len(record["token_ids"]) == LENGTH
    read = read_pairs(pairs, None, 0, 4096)
    assert read.prompt_lengths.tolist() == [len(record["prompt_ids"]) for record in records]
    with pytest.raises(ValueError, match="no pairs that are finished"):
        read_pairs(pairs, None, 0, 4096, finished_only=True)
    alone = tmp_path / "alone.jsonl"
    run("--prompt", texts[0], "--output", str(alone), "--seed", "3", "--temperature", "0", "--quiet")
    assert lines(alone)[0]["token_ids"] == records[0]["token_ids"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"prompt": "a"}\n["b"]\n', [], "line 2: not a JSON object with a text `prompt`"),
        ('{"prompt": 3}\n', [], "line 1: not a JSON object"),
        ("", [], "has no prompts"),
        (None, [], "cannot be read"),
        ('{"prompt": "a"}\n', ["--num-samples", "2"], "--num-samples does not go with --prompts"),
        ('{"prompt": "a"}\n', ["--prompt", "b"], "--prompt does not go with --prompts"),
        ('{"prompt": "a"}\n{"prompt": "a b c d e f g h i j k l m n o"}\n', [], "prompt 2: the prompt"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    run: Run, tmp_path: Path, content: str | None, options: list[str], message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    code, _, err = run("--prompts", str(path), *options)
    assert code == 2
    assert message in err


FAKE = """
import sys
from types import SimpleNamespace
import mdkern.cli.main as cli, mdkern.cli.sample as sample
from mdkern.cli.report import Printer
def run(arguments):
    printer = Printer(headed=False, essential={essential})
    printer.show([0], ["some text"])
    print("went on", file=sys.stderr)
    if printer.failure is not None:
        raise printer.failure
sample.run_sample = run
raise SystemExit(cli.main(["sample"]))
"""


@pytest.mark.parametrize(
    ("redirection", "essential", "code", "errors"),
    [
        (">&-", True, 0, ["went on"]),
        (">/dev/full", True, 1, ["mdkern: error: standard output: No space left on device"]),
        (">/dev/full", False, 1, ["went on", "mdkern: error: standard output: No space left on device"]),
        ("", True, 1, []),  # a pipe whose reader has left
        ("", False, 1, ["went on"]),
        ("2>&- >&-", True, 0, []),
    ],
)
def test_standard_output_that_is_closed_full_or_left(
    tmp_path: Path, redirection: str, essential: bool, code: int, errors: list[str]
) -> None:
    """Whether the run goes on depends on whether the texts go anywhere else; there is never a traceback."""
    (tmp_path / "fake.py").write_text(FAKE.format(essential=essential))
    root = Path(__file__).parents[2]
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        ["bash", "-c", f"{sys.executable} {tmp_path}/fake.py {redirection}"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    os.close(writer)
    assert found.returncode == code
    assert found.stderr.splitlines() == errors
