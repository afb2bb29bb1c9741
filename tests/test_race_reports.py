"""What racecheck says is told apart: Triton's own words for groups of warps, and anything else."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.suites import race_reports

SOURCE = """@gluon.jit
def plain_kernel(x):
    gl.store(x, 1)


@gluon.jit
def divided_kernel(
    x, KIND: gl.constexpr
):
    ring.store(x)
    if KIND:
        gl.warp_specialize([(f, (x,)), (g, (x,))], [1], [24])
"""
READ = "========= Error: Race reported between Read access at divided_kernel+0x120 in divided.py:{}"
WRITE = "=========     and Write access at divided_kernel+0x9eb0 in divided.py:{} [55 hazards]"


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "divided.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize("line", range(1, 13))
def test_only_the_hand_over_is_excused(kernels: Path, line: int) -> None:
    found = race_reports.races([READ.format(7), "=========", WRITE.format(line)], kernels)
    assert found == ([] if line in (6, 7, 11, 12) else [WRITE.format(line)])


def test_what_has_no_place_is_a_race(kernels: Path) -> None:
    nowhere = READ.split(" in ")[0]
    elsewhere = READ.format(7).replace("divided.py", "other.py")
    assert race_reports.races([nowhere, elsewhere, "skinny: 0.0001 apart at most"], kernels) == [nowhere, elsewhere]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("skinny: 0.1 apart at most\n========= RACECHECK SUMMARY: 0 hazards displayed\n", 0),
        (READ.format(7) + "\n========= RACECHECK SUMMARY: 1 hazard displayed\n", 1),  # no such kernel here
        ("========= Target application returned an error\n========= RACECHECK SUMMARY: 0 hazards\n", 1),
        ("Killed\n", 1),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, text: str, code: int) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert race_reports.main() == code
