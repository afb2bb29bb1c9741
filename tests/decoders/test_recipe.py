"""A decoder is added by the steps that CONTRIBUTING.md names, each an addition to one file, and nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.decoder_cases import Case
from benchmarks.plain_loop import Plain, Step
from mdkern import decoders
from mdkern.cli.decoder import parse_decoder
from mdkern.decoders import DECODERS, Stepwise
from tests.benchmarks.test_bench_decoders import check_same_text
from tests.decoders.test_decoders import check_reveals
from tests.engine import test_stepwise
from tests.problems.decoder_states import make_decoder
from tests.references import decoding_rules as reference

# The decoder's own file, after the model of threshold.py: of the sure ones, the leftmost.
MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from mdkern.decoders.base import Choice, Proposal, Stepwise, View


@dataclass(frozen=True)
class Leftmost(Stepwise, name="leftmost"):
    """The leftmost `count` masked positions."""

    adaptive: ClassVar[bool] = True

    count: int = 2

    def choose(self, view: View, proposal: Proposal) -> Choice:
        quota = torch.full_like(view.step, self.count)
        return Choice(-view.offset.float(), view.masked, "top_k", quota=quota)
'''


def rule(rows: Any, masked: list[bool], block: range, count: int) -> dict[int, int]:
    """The rule once more, for tests/references/decoding_rules.py."""
    return {place: rows[place].token for place in [place for place in block if masked[place]][:count]}


def loop(step: Step) -> torch.Tensor:
    """And as a plain loop, for benchmarks/plain_decoders.py."""
    chosen = step.masked & (step.masked.cumsum(-1) <= 3)
    return torch.where(chosen, step.logits.argmax(-1), step.ids)


@pytest.fixture
def leftmost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Any]]:
    """The decoder's class, its module in a folder that stands beside the package's own."""
    (tmp_path / "leftmost.py").write_text(MODULE)
    monkeypatch.setattr(decoders, "__path__", [*decoders.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    assert "Leftmost" in decoders.find_decoders()
    yield decoders.Leftmost
    del DECODERS["leftmost"], decoders.Leftmost, decoders.leftmost
    del sys.modules["mdkern.decoders.leftmost"]


def test_a_new_file_is_a_decoder(leftmost: type[Any]) -> None:
    assert decoders.by_name("leftmost") == leftmost(2)
    assert parse_decoder("leftmost:count=5")(None, 8) == leftmost(5)
    with pytest.raises(ValueError, match="leftmost has no parameter 'share', there is count"):
        parse_decoder("leftmost:share=1")


def test_its_rule_is_held_against_it(leftmost: type[Any]) -> None:
    case = reference.Case("leftmost", {"count": 3}, rule, (3,))
    for tied in (False, True):
        check_reveals(make_decoder(case), case, tied, trials=8)
    with pytest.raises(AssertionError):
        check_reveals(leftmost(2), case, False, trials=8)


@pytest.mark.filterwarnings("ignore:.*runs by its logits")
def test_it_runs_as_the_slow_loop_does(leftmost: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_stepwise.STEPWISE, "leftmost", leftmost(3))
    test_stepwise.test_the_slow_loops_sequences("leftmost", 9, 4, 0.7, "H9")


@pytest.mark.filterwarnings("ignore:.*runs by its logits")
def test_its_plain_loop_is_held_against_it(leftmost: type[Any]) -> None:
    check_same_text(Case("leftmost", "nobody", leftmost(3), Plain(loop, adaptive=True), 0.0), 4)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="decoder Another: the name 'threshold' is taken by Threshold"):

        @dataclass(frozen=True)
        class Another(Stepwise, name="threshold"):
            pass

    assert DECODERS["threshold"] is decoders.Threshold
