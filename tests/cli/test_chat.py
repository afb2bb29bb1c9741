"""``mdkern sample --chat`` and ``mdkern chat``: what is asked, what is shown, and what is kept."""

from __future__ import annotations

import io
import itertools
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mdkern
from mdkern.cli import main as cli
from mdkern.cli.chat import Conversation, talk
from mdkern.cli.drafts import Display, Drafted, wrapped
from mdkern.decoders import Threshold
from mdkern.schedule import Schedule
from tests.problems.checkpoints import END, MASK, TURN, make_tokenizer, save
from tests.problems.hf_models import adapted, bert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("instruct") / "bert", bert(), make_tokenizer())


def expected(folder: str, messages: list[tuple[str, str]], new_tokens: int, **options: Any) -> str:
    """The answer of `mdkern.sample` to the conversation in its template, written out here."""
    model = mdkern.from_pretrained(folder)
    text = "".join(f"<|{role}|> {content} <|turn|>" for role, content in messages) + "<|assistant|>"
    ids = model.tokenizer.encode(text, add_special_tokens=False) + [MASK] * new_tokens
    out = mdkern.sample(model, input_ids=torch.tensor([ids]), stop_at_eos=True, **options)
    assert out.sequences is not None
    written = out.sequences[0, len(ids) - new_tokens :].tolist()
    kept = list(itertools.takewhile(lambda token: token not in (END, TURN), written))
    return str(model.tokenizer.decode(kept, skip_special_tokens=True))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    capsys.readouterr()
    try:
        code: Any = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_sample_puts_the_prompt_into_the_template_and_prints_the_answer(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--system", "w9", "--new-tokens", "8", "--seed", "1", "--temperature", "0", "--decoder", "entropy"]
    code, out, _ = run(capsys, "sample", "--device", "cpu", "--model", folder, "--chat", "--prompt", "w8", *options)
    want = expected(folder, [("system", "w9"), ("user", "w8")], 8, decoder="entropy", temperature=0.0)
    assert (code, out.rstrip("\n")) == (0, want)
    code, out, _ = run(capsys, "sample", "--device", "cpu", "--model", folder, "--chat", "--prompt", "w8", "--quiet")
    assert code == 0  # an answer of as much as fits


def lines_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_chat_from_a_pipe_keeps_what_was_said(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"decoder": "threshold", "block_length": 4, "temperature": 0.0}
    first = expected(folder, [("user", "w8 w9")], 4, **options)
    second = expected(folder, [("user", "w8 w9"), ("assistant", first), ("user", "w10")], 4, **options)
    anew = expected(folder, [("user", "w10")], 4, **options)
    lines_in(monkeypatch, "w8 w9\n\nw10\n/new\nw10\n")
    code, out, err = run(capsys, "chat", "--device", "cpu", "--model", folder, "--new-tokens", "4")
    assert (code, out) == (0, f"{first}\n{second}\n{anew}\n"), err


def test_a_conversation_that_is_too_long_says_so(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines_in(monkeypatch, "w8 " * 12 + "\n")
    code, _, err = run(capsys, "chat", "--device", "cpu", "--model", folder, "--new-tokens", "10")
    assert code == 2
    assert "the conversation has 15 tokens, with which 10 more do not fit the 24 positions" in err


def test_models_that_do_not_chat_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = save(tmp_path / "bare", bert(), make_tokenizer(template=None))
    lines_in(monkeypatch, "w8\n")
    for command in (["chat"], ["sample", "--chat", "--prompt", "w8"]):
        code, out, err = run(capsys, *command, "--device", "cpu", "--model", bare)
        assert (code, out) == (2, "")
        assert "the tokenizer has no chat template, so that its model was not made for conversations" in err
    for options, message in (
        ([], "give an instruct model: mdkern chat --model PATH"),
        (["--stop-at-eos"], "--stop-at"),
    ):
        code, _, err = run(capsys, "chat", "--device", "cpu", *options)
        assert code == 2
        assert message in err


BAD: dict[str, tuple[list[str], str]] = {
    "no question": (["--chat"], "--chat needs --prompt"),
    "system without chat": (["--system", "w8"], "--system goes with --chat"),
    "two lengths": (["--length", "8", "--new-tokens", "4", "--prompt", "w8"], "--new-tokens does not go with --length"),
    "too many": (["--new-tokens", "24", "--prompt", "w8"], "more than the 24 positions of the models: lower --new-t"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_do_not_go_together(folder: str, capsys: pytest.CaptureFixture[str], case: str) -> None:
    options, message = BAD[case]
    code, _, err = run(capsys, "sample", "--device", "cpu", "--model", folder, *options)
    assert code == 2
    assert message in err


class Terminal(io.StringIO):
    """A terminal of so many columns and endless height: what is written, and what then stands on the screen."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self, columns: int) -> list[str]:
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]", self.getvalue()):
            if part.startswith("\x1b") and part[-1] == "F":
                row, column = row - int(part[2:-1]), 0
            elif part == "\x1b[J":
                rows = [*rows[:row], rows[row][:column]]
            elif part == "\n" or (len(part) == 1 and column == columns):
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            if len(part) == 1 and part != "\n":
                rows[row] = rows[row][:column] + part + rows[row][column + 1 :]
                column += 1
        return rows


def drafts_of(ids: list[int], seed: int) -> Iterator[torch.Tensor]:
    """The text with its tokens appearing one by one in random order."""
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    for count in range(len(ids) + 1):
        shown = set(order[:count])
        yield torch.tensor([[9, 9, *(token if i in shown else MASK for i, token in enumerate(ids))]])


@pytest.mark.parametrize("columns", [7, 20, 80])
def test_a_terminal_shows_each_draft_and_at_last_the_text(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: type("Size", (), {"columns": columns, "lines": 99}))
    monkeypatch.setenv("TERM", "xterm")
    terminal, tokenizer = Terminal(), make_tokenizer()
    display = Display(terminal)
    streamer = Drafted(display, tokenizer, 2, MASK, (END, TURN))
    ids = [8, 10, 12, 14, 16, 18, 20, 22, END, END]
    for number, draft in enumerate(drafts_of(ids, columns)):
        streamer.put_draft(draft)
        screen = "".join(terminal.screen(columns))
        before_end = draft[0, 2:].tolist()
        before_end = before_end[: before_end.index(END)] if END in before_end else before_end
        assert screen.count("·") == before_end.count(MASK), number
        assert all(f"w{token}" in screen for token in before_end if token != MASK)
    display.finish("w8 w10\nan answer")
    assert terminal.screen(columns) == [*wrapped("w8 w10\nan answer", columns), ""]


@pytest.mark.parametrize("seed", range(4))
def test_elsewhere_the_known_beginning_grows_and_is_never_taken_back(seed: int) -> None:
    stream = io.StringIO()
    display, tokenizer = Display(stream), make_tokenizer()
    streamer = Drafted(display, tokenizer, 2, MASK, (END, TURN))
    ids, before = [8, 10, 12, 14, 16, END], ""
    for draft in drafts_of(ids, seed):
        streamer.put_draft(draft)
        known = list(itertools.takewhile(lambda token: token not in (MASK, END), draft[0, 2:].tolist()))
        assert stream.getvalue() == tokenizer.decode(known)
        assert stream.getvalue().startswith(before)
        before = stream.getvalue()
    display.finish(tokenizer.decode(ids[:-1]))
    assert stream.getvalue() == f"{tokenizer.decode(ids[:-1])}\n"


def test_ctrl_c_stops_an_answer_and_then_the_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = adapted(bert(), eos_id=[END, TURN]), make_tokenizer()
    options: dict[str, Any] = {"block_length": 4, "temperature": 0.0}
    conversation = Conversation({"H": model}, tokenizer, Schedule.constant("H"), Threshold(), None, 4, options, seed=0)
    asked: Any = iter(["w8", "w9", KeyboardInterrupt])

    def answer(_: str) -> str:
        said = next(asked)
        if said is KeyboardInterrupt:
            raise KeyboardInterrupt
        return str(said)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("mdkern.engine.hooks.SECONDS_BETWEEN_DRAFTS", 0.0)
    interrupts: Any = iter([True])

    class Interrupted(Display):
        def draft(self, pieces: Any) -> None:
            if next(interrupts, False):
                raise KeyboardInterrupt

    talk(conversation, Interrupted(sys.stdout), asks=True)
    assert [turn["content"] for turn in conversation.messages[::2]] == ["w9"]
    out, err = capsys.readouterr()
    assert out.strip() == conversation.messages[1]["content"]
    assert "stopped, the question is forgotten" in err
