"""All data that outlast a tick: the sampler's state and a segment's ticks, in device tensors at fixed addresses.

These tensors are what a captured graph of a tick reads and writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdkern.engine.request import Request
from mdkern.plan import Ticks, positions_in_text

RUNNING, ALL_REVEALED, END_OF_TEXT, FAILED = range(4)  # why a sequence stopped; FAILED: no token could be drawn
STOP_REASONS = ("running", "all_revealed", "end_of_text", "failed")
MOST_ENTRIES = 1 << 22  # int64 entries of a `TickBuffer`: 32 MiB
MOST_TICKS = 4096


@dataclass(frozen=True)
class Outcome:
    """The results of a run beside its sequences."""

    step: Tensor  # int64 [N, L]: step at which each position was last revealed, T for the closing pass, or GIVEN
    model: Tensor  # int64 [N, L]: number of the denoiser that revealed it, GIVEN where the input gave the token
    log_prob: Tensor  # float32 [N, L]: of each token when it was revealed, NaN where none was recorded
    nfe: dict[str, Tensor]  # int64 [N] each, by denoiser
    stop_reason: Tensor  # int64 [N]
    failure: Exception | None = None  # the error of the first sample that failed
    commits: dict[str, Tensor] | None = None  # int64 [N] each, of `nfe` those passes that revealed nothing

    @property
    def finished(self) -> Tensor:
        """bool ``[N]``: the samples that were finished."""
        return (self.stop_reason == ALL_REVEALED) | (self.stop_reason == END_OF_TEXT)


class IncompleteError(Exception):
    """Ends a run early. Its cause is the error that ended it; it carries the outcome so far."""

    def __init__(self, outcome: Callable[[], Outcome]) -> None:
        super().__init__()
        self.outcome = outcome


class Timings:
    """Seconds by what they were spent on, lap by lap."""

    def __init__(self, began: float) -> None:
        self.began = self.last = began
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def total(self) -> dict[str, float]:
        return self.seconds | {"total": time.perf_counter() - self.began}


@dataclass
class SamplerState:
    """The sampler's state between ticks. Row N of tensors over sequences is scratch for unused slots."""

    input_ids: Tensor  # int64 [N + 1, L]
    attention_mask: Tensor | None  # bool [N + 1, L]
    given: Tensor  # bool [N + 1, L], not masked at the start
    text_position: Tensor  # int64 [N + 1, L], keys the noise
    sample: Tensor  # int64 [N + 1], keys the noise
    temperature: Tensor  # float32 []
    closing_step: Tensor  # int64 [], the step whose rows have temperature 0
    seed: Tensor  # int64 []
    tick: Tensor  # int64 [1]
    failed: Tensor  # bool [], whether a row had NaN logits
    log_prob: Tensor  # float32 [N + 1, L], of each token when it was revealed; NaN where none was recorded

    @staticmethod
    def allocate(sequences: int, length: int, padded: bool, device: torch.device) -> SamplerState:
        """State for up to `sequences` sequences, with no request loaded."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return SamplerState(
            input_ids=zeros(sequences + 1, length),
            attention_mask=torch.ones_like(zeros(sequences + 1, length), dtype=torch.bool) if padded else None,
            given=zeros(sequences + 1, length, dtype=torch.bool),
            text_position=zeros(sequences + 1, length),
            sample=zeros(sequences + 1),
            temperature=zeros(dtype=torch.float32),
            closing_step=zeros(),
            seed=zeros(),
            tick=zeros(1),
            failed=zeros(dtype=torch.bool),
            log_prob=zeros(sequences + 1, length, dtype=torch.float32),
        )

    @staticmethod
    def of(request: Request) -> SamplerState:
        """State of exactly the request's size, loaded with it."""
        count, length = request.input_ids.shape
        state = SamplerState.allocate(count, length, request.attention_mask is not None, request.device)
        state.load(request)
        return state

    def load(self, request: Request) -> None:
        """Start a request: its N sequences go to the first N rows."""
        count, length = request.input_ids.shape
        mask = request.attention_mask
        self.input_ids[:count] = request.input_ids
        self.input_ids[count:] = 0  # unused slots run, too, and 0 is an id of every vocabulary
        self.given[:count] = ~request.masked
        if self.attention_mask is not None:
            self.attention_mask[:count] = True if mask is None else mask
        self.text_position[:count] = (
            torch.arange(length, device=request.device) if mask is None else positions_in_text(mask)
        )
        self.sample[:count] = request.sample_ids
        self.temperature.fill_(request.temperature)
        self.closing_step.copy_(request.steps.max())
        self.seed.fill_(request.seed)
        self.failed.fill_(False)
        self.log_prob.fill_(torch.nan)


class TickBuffer:
    """Room for some ticks of a segment at fixed addresses. Longer segments are loaded in chunks."""

    def __init__(self, slots: int, width: int, rows: int, scratch: int, device: torch.device) -> None:
        self.scratch = scratch
        count = max(1, min(MOST_TICKS, MOST_ENTRIES // (slots * (width + 3) + rows)))

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((count, *shape), dtype=dtype, device=device)

        self.ticks = Ticks(
            sequence=zeros(slots),
            step=zeros(slots),
            time=zeros(slots, dtype=torch.float32),
            position=zeros(slots, width),
            row=zeros(rows),
            row_count=zeros(),
            batch=[],
            size=[],
            rows=[],
        )

    def idle(self) -> None:
        """Make every tick work on the scratch row only."""
        self.ticks.sequence.fill_(self.scratch)
        self.ticks.time.fill_(1.0)
        for tensor in (self.ticks.step, self.ticks.position, self.ticks.row, self.ticks.row_count):
            tensor.zero_()

    def load(self, ticks: Ticks, start: int) -> int:
        """Copy ticks from number `start` on. Returns how many were copied."""
        count = min(len(self.ticks.row_count), len(ticks) - start)
        for name in ("sequence", "step", "time", "position", "row", "row_count"):
            getattr(self.ticks, name)[:count].copy_(getattr(ticks, name)[start : start + count])
        return count
