"""The tick's Triton kernels in Triton's interpreter: run by the tests in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import triton

from mdkern.kernels.loop import triton_tick
from tests.problems.tick import check_tick

assert triton.knobs.runtime.interpret, "these run with TRITON_INTERPRET=1"


@pytest.mark.parametrize("padded", [False, True])
def test_as_plain_pytorch(padded: bool) -> None:
    check_tick(triton_tick.begin_tick, triton_tick.end_tick, padded)
