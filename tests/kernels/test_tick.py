"""`begin_tick` and `end_tick`: the kernels do what plain PyTorch does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mdkern.kernels.loop.tick import (
    TickSource,
    begin_tick,
    begin_tick_operator,
    begin_tick_reference,
    end_tick,
    end_tick_operator,
)
from tests.own_process import run_in_the_interpreter
from tests.problems.tick import arguments, check_tick, random_state


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_in_the_interpreter("tests/suites/interpreted_tick.py")


@pytest.mark.parametrize("padded", [False, True])
def test_registered_well(padded: bool) -> None:
    """Schema, fake kernels and mutation annotations hold."""
    state, ticks = random_state(padded)
    source, *sizes = arguments(state, ticks, 1)
    torch.library.opcheck(begin_tick_operator, (*source, *sizes), test_utils=("test_schema", "test_faketensor"))
    *_, row_count, keys, _, target = begin_tick_reference(source, *sizes)
    token = torch.zeros(len(keys), dtype=torch.int64)
    end = (state.input_ids, state.failed, state.tick, token, target, row_count)
    torch.library.opcheck(end_tick_operator, end, test_utils=("test_schema", "test_faketensor"))


def begin_tick_on(source: TickSource, *sizes: int) -> Any:
    return begin_tick_operator(*source, *sizes)


def test_more_than_a_tick_has_is_refused() -> None:
    source, batch, capacity = arguments(*random_state(False), 1)
    for sizes in ((source.sequence.shape[1] + 1, capacity), (batch, capacity + 1)):
        with pytest.raises(ValueError, match="a tick has"):
            begin_tick(source, *sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": torch.zeros(4, dtype=torch.int32)}, "token must be torch.int64"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target must be torch.int64"),
        ({"failed": torch.zeros(1, dtype=torch.bool)}, "failed must be torch.bool"),
        ({"input_ids": torch.zeros(3, 1, dtype=torch.int64).expand(3, 5)}, "contiguous"),
        ({"tick": torch.zeros(1, dtype=torch.int64, device="meta")}, "meta"),
    ],
)
def test_what_an_end_cannot_write_is_refused(changes: dict[str, Tensor], message: str) -> None:
    zeros = partial(torch.zeros, dtype=torch.int64)
    given = {"input_ids": zeros(3, 5), "failed": zeros(()).bool(), "tick": zeros(1), "token": zeros(4)}
    given |= {"target": zeros(4), "row_count": zeros(())}
    end_tick(**given)
    with pytest.raises(ValueError, match=message):
        end_tick(**(given | changes))


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
def test_on_gpu(padded: bool) -> None:
    check_tick(begin_tick_on, end_tick_operator, padded, "cuda")
