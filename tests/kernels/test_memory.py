"""Kernels touch what they are given, read what was written, and count past 2^31."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.own_process import run_in_the_interpreter
from tests.suites import small_launches


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_memory.py")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", small_launches.LAUNCHES)
def test_what_the_sanitizer_runs_is_right(name: str, device: str) -> None:
    assert small_launches.main([name], device) == 0


def test_a_wrong_launch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device: str) -> Iterator[Tensor]:
        yield torch.ones(3)
        yield torch.tensor(0.5 if device == "cuda" else 1.0)

    monkeypatch.setitem(small_launches.LAUNCHES, "skinny", launch)
    assert small_launches.main(["skinny"], "cuda") == 1
