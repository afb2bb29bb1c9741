"""`begin_tick` and `end_tick`: the kernels do what plain PyTorch does."""

from __future__ import annotations

import pytest
import torch

from mdkern.kernels.loop.tick import _begin_tick, _end_tick, begin_in_pytorch
from tests.own_process import run_in_the_interpreter
from tests.problems.tick import arguments, check_tick, random_state


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_tick.py")


@pytest.mark.parametrize("padded", [False, True])
def test_registered_well(padded: bool) -> None:
    """Schema, fake kernels and mutation annotations hold."""
    state, ticks = random_state(padded)
    given = arguments(state, ticks, 1)
    torch.library.opcheck(_begin_tick, given, test_utils=("test_schema", "test_faketensor"))
    *_, row_count, keys, _, target = begin_in_pytorch(*given)
    token = torch.zeros(len(keys), dtype=torch.int64)
    end = (state.input_ids, state.failed, state.tick, token, target, row_count)
    torch.library.opcheck(_end_tick, end, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
def test_on_gpu(padded: bool) -> None:
    check_tick(_begin_tick, _end_tick, padded, "cuda")
