"""A random state of the sampler and a segment's ticks, and what both ends of a tick must make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdkern.engine.state import SamplerState
from mdkern.kernels.loop import tick
from mdkern.plan import RevealPlan, Ticks

SEQUENCES, LENGTH, STEPS, BATCH = 5, 40, 30, 3


def random_state(padded: bool, device: str = "cpu") -> tuple[SamplerState, Ticks]:
    generator = torch.Generator().manual_seed(0)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    state = SamplerState.allocate(SEQUENCES, LENGTH, padded, torch.device("cpu"))
    state.input_ids[:] = whole(1000, SEQUENCES + 1, LENGTH)
    state.text_position[:] = whole(2**20, SEQUENCES + 1, LENGTH)
    state.sample[:] = whole(2**31, SEQUENCES + 1)
    if state.attention_mask is not None:
        state.attention_mask[:] = whole(2, SEQUENCES + 1, LENGTH).bool()
    state.temperature.fill_(0.7)
    state.closing_step.fill_(STEPS)
    step = whole(STEPS + 1, SEQUENCES, LENGTH)
    plan = RevealPlan(step, STEPS, time=torch.linspace(1, 0, STEPS + 1)[step])
    ticks = plan.ticks(0, STEPS + 1, BATCH, lambda size: size + 3)
    assert ticks is not None
    for thing in (state, ticks):
        for name, value in vars(thing).items():
            if isinstance(value, Tensor):
                object.__setattr__(thing, name, value.to(device))
    return state, ticks


def arguments(state: SamplerState, ticks: Ticks, number: int) -> tuple[Any, ...]:
    """Of `begin_tick`, for tick `number`."""
    state.tick.fill_(number)
    known = (state.input_ids, state.attention_mask, state.text_position, state.sample, state.temperature)
    packed = (ticks.sequence, ticks.step, ticks.time, ticks.position, ticks.row, ticks.row_count, state.tick)
    source = tick.TickSource(*known, state.closing_step, *packed)
    return source, ticks.batch[number], ticks.row.shape[1]


def check_tick(begin: Any, end: Any, padded: bool, device: str = "cpu") -> None:
    """`begin` and `end` do what plain PyTorch does, at every tick."""
    state, ticks = random_state(padded, device)
    for number in range(len(ticks)):
        given = arguments(state, ticks, number)
        ours, theirs = begin(*given), tick.begin_tick_reference(*given)
        used = torch.arange(ticks.row.shape[1], device=device) < ticks.row_count[number]
        for at, (a, b) in enumerate(zip(ours, theirs)):
            rows = at in (4, 6, 7, 8)
            assert a.dtype == b.dtype
            assert torch.equal(a[used], b[used]) if rows else torch.equal(a, b)
        assert (ours[8][~used] // LENGTH == SEQUENCES).all()  # to scratch
        token = torch.randint(1000, used.shape, device=device)
        token[~used] = -1
        if number == len(ticks) - 1:
            token[0] = -1
        target = ours[8]
        results = []
        for finish in (end, tick.end_tick_reference):
            ids, failed, count = state.input_ids.clone(), state.failed.clone(), state.tick.clone()
            finish(ids, failed, count, token, target, ours[5])
            assert int(count) == number + 1
            assert bool(failed) == (number == len(ticks) - 1)
            results.append(ids[:-1])
        assert torch.equal(*results)
        assert (results[0] != state.input_ids[:-1]).any()
