"""Kernels touch what they are given, read what was written, and count past 2^31."""

from __future__ import annotations

import pytest

from tests.own_process import run_in_the_interpreter


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_memory.py")
