"""The progress of step-by-step decoding: the settings of the run, and device tensors that each step updates."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from mdkern import decoders
from mdkern.decoders import Stepwise
from mdkern.decoders.base import settles
from mdkern.decoders.checks import times_of
from mdkern.engine.request import Filters, Request
from mdkern.engine.state import ALL_REVEALED, RUNNING, SamplerState
from mdkern.models.fingerprint import describe, fingerprint
from mdkern.routing import Router


@dataclass(frozen=True)
class Settings:
    """What stays the same during a run."""

    decoder: Stepwise
    filters: Filters
    block_length: int | None  # None: one block, the whole sequence
    mask_id: int
    eos_ids: tuple[int, ...]  # ends of text; the first fills a sequence that is stopped
    stop_at_eos: bool  # whether they stop a sequence
    guidance_scale: float
    logits_processor: Any  # not with graphs
    stopping_criteria: Any  # not with graphs
    router: Router | None  # chooses the model of each sequence's next pass; None: the schedule does
    most_passes: int | None  # passes after which a sequence with masks left fails; None: the decoder is known to finish

    @staticmethod
    def of(request: Request) -> Settings:
        decoder, most_passes = request.decoder, None
        assert isinstance(decoder, Stepwise)
        if not type(decoder).__module__.startswith(f"{decoders.__name__}."):  # somebody's own, by name or not
            needed = (
                (1 + decoder.closing_steps) * request.input_ids.shape[1] if decoder.adaptive else request.most_steps
            )
            most_passes = 4 * needed + 64
        return Settings(
            decoder=decoder,
            filters=request.filters,
            block_length=request.block_length,
            mask_id=request.mask_id,
            eos_ids=request.eos_ids,
            stop_at_eos=request.stop_at_eos,
            guidance_scale=request.guidance_scale,
            logits_processor=request.logits_processor,
            stopping_criteria=request.stopping_criteria,
            router=request.router,
            most_passes=most_passes,
        )

    @property
    def remasks(self) -> bool:
        return type(self.decoder).remask is not Stepwise.remask

    @property
    def rewrites(self) -> bool:
        """Whether the decoder may replace a revealed token by another one or by the mask."""
        return self.remasks or type(self.decoder).edit is not Stepwise.edit

    @property
    def settles(self) -> bool:
        """Whether the decoder says when a block is over."""
        return settles(self.decoder)

    @property
    def keeps_nothing(self) -> bool:
        """Whether a step runs no code of the user's, which may keep what it computes."""
        return self.most_passes is None and self.router is None

    def key(self) -> Hashable:
        """A key that is equal for equal settings; decoders are compared by their parameters."""
        counts = self.block_length, self.mask_id, self.eos_ids, self.stop_at_eos, identity(self.router)
        if not is_dataclass(self.decoder):  # its parameters are not known, so it equals only itself
            return self.decoder, self.filters, self.guidance_scale, counts
        known = tuple(identity(getattr(self.decoder, field.name)) for field in fields(self.decoder))
        return type(self.decoder), known, self.filters, self.guidance_scale, counts


def identity(value: Any) -> Hashable:
    """A key that distinguishes a decoder's parameter from any other, past or future.

    It holds functions and modules themselves, so that no later object gets their address. For a tensor it is the
    address, because a captured step reads whatever lies there.
    """
    if isinstance(value, Tensor):
        return describe(value)
    if isinstance(value, dict):
        return tuple((key, identity(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(identity, value))
    try:
        hash(value)
    except TypeError:  # it may change unnoticed, so it never equals anything
        return object()
    return value, fingerprint(value)


@dataclass
class Progress:
    """The state of the sequences beside their ids, as device tensors. Row N of tensors over sequences is scratch."""

    wanted: Tensor  # bool [N + 1, L], masked at the start: what may be written
    start: Tensor  # int64 [N + 1], the column from which blocks are counted
    total: Tensor  # int64 [N + 1], number of wanted columns
    pace: Tensor  # int64 [N + 1, 3]: T, steps of a block, and the segment's last step plus 1; gathered together
    timetable: Tensor  # int64 [N + 1], the row of `times` of each sequence
    block: Tensor  # int64 [N + 1]
    block_step: Tensor  # int64 [N + 1]
    block_masked: Tensor  # int64 [N + 1], number of masked columns of the block when it began
    block_limit: Tensor  # int64 [N + 1], passes after which a block without masks is over, if the decoder `settles`
    closing: Tensor  # int64 [N + 1], passes of the block since its last mask was revealed
    passes: Tensor  # int64 [N + 1], forward passes so far
    nfe: Tensor  # int64 [models, N + 1]
    kept: Tensor  # int64 [N + 1], columns whose keys and values are final; a multiple of the block length
    commits: Tensor  # int64 [models, N + 1], of `nfe` those passes that only made keys and values final
    route: Tensor  # int64 [N + 1], number of the model that each sequence's next pass wants; for routers
    stop_reason: Tensor  # int64 [N + 1], RUNNING at first
    confidence: Tensor  # float32 [N + 1, L]
    softness: Tensor  # float32 [N + 1, L], share of each token in the next pass's input, see `Stepwise.soft`
    reveal_step: Tensor  # int64 [N + 1, L], -1 where given
    reveal_model: Tensor  # int64 [N + 1, L]
    slot: Tensor  # int64 [B], the sequence that each slot works on; N: none
    queue: Tensor  # int64 [N + 1], the segment's sequences; N after the last
    next: Tensor  # int64 [], the next place in the queue
    times: Tensor  # float32 [timetables, T + 1], diffusion times by step, a row for each distinct T
    status: Tensor  # int64 [2]: number of slots that have work, and of masked columns of all sequences
    report: Tensor  # int64 [2], on the host: a copy of `status`, made after each tick

    @staticmethod
    def allocate(
        sequences: int, length: int, batch: int, models: int, times: tuple[int, int], device: torch.device
    ) -> Progress:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, grid = sequences + 1, (sequences + 1, length)
        return Progress(
            wanted=zeros(*grid, dtype=torch.bool),
            start=zeros(rows),
            total=zeros(rows),
            pace=zeros(rows, 3),
            timetable=zeros(rows),
            block=zeros(rows),
            block_step=zeros(rows),
            block_masked=zeros(rows),
            block_limit=zeros(rows),
            closing=zeros(rows),
            passes=zeros(rows),
            nfe=zeros(models, rows),
            kept=zeros(rows),
            commits=zeros(models, rows),
            route=zeros(rows),
            stop_reason=zeros(rows),
            confidence=zeros(*grid, dtype=torch.float32),
            softness=zeros(*grid, dtype=torch.float32),
            reveal_step=zeros(*grid),
            reveal_model=zeros(*grid),
            slot=zeros(batch),
            queue=zeros(rows),
            next=zeros(),
            times=zeros(*times, dtype=torch.float32),
            status=zeros(2),
            report=torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda"),
        )

    def load(self, request: Request, settings: Settings) -> None:
        """Start a request: its sequences go to the first rows, each at its first block."""
        for field in fields(self):
            getattr(self, field.name).zero_()
        count, wanted = len(request.input_ids), request.masked
        self.wanted[:count] = wanted
        self.start[:count] = request.start
        self.total[:] = self.wanted.sum(-1)
        self.confidence.fill_(1.0)
        self.softness.fill_(1.0)
        self.reveal_step.fill_(-1)
        self.reveal_model.fill_(-1)
        self.stop_reason[count:] = ALL_REVEALED
        self.pace.fill_(1)
        self.pace[:count, 0] = request.steps
        self.pace[:count, 1] = request.steps // request.blocks
        each, self.timetable[:count] = request.steps.unique(return_inverse=True)
        for number, steps in enumerate(each.tolist()):
            self.times[number, : steps + 1] = times_of(request.decoder, steps)
        self.idle()
        mask = request.attention_mask
        self.block_limit[:count] = wanted.shape[1] if mask is None else mask.sum(-1)
        if settings.block_length is None:
            self.block_masked.copy_(self.total)
        else:
            self.block_limit.clamp_(max=settings.block_length)
            column = torch.arange(wanted.shape[1], device=wanted.device)
            inside = column < self.start[:, None] + settings.block_length
            self.block_masked.copy_((self.wanted & inside).sum(-1))

    def idle(self) -> None:
        """Take the work from all slots."""
        self.slot.fill_(len(self.start) - 1)

    def count_slots(self) -> None:
        """Count the slots that have work anew, after they were changed in a step."""
        self.status[:1].copy_((self.slot != len(self.start) - 1).sum())

    def tell(self) -> None:
        """Copy the status to the host. Once a tick, at its end: the host reads it at any time."""
        self.report.copy_(self.status, non_blocking=True)

    def key(self) -> Hashable:
        """A key that is equal for tensors of equal sizes."""
        return len(self.slot), self.nfe.shape[0], *self.times.shape

    def time(self, sequence: Tensor, step: Tensor) -> Tensor:
        """float32 ``[B]``: the diffusion time before a step of each sequence."""
        return self.times[self.timetable[sequence], step]

    def schedule_step(self, settings: Settings, masked: Tensor, sequence: Tensor, pace: Tensor) -> Tensor:
        """int64 ``[B]``: the step, of T, of sequences with ``masked [B]`` columns left and of this ``pace [B, 3]``."""
        steps, block_steps, _ = pace.unbind(-1)
        if not settings.decoder.adaptive:
            return self.block[sequence] * block_steps + self.block_step[sequence]
        total = self.total[sequence]
        return torch.minimum((total - masked) * steps // total.clamp(min=1), steps - 1)

    def begin_segment(self, state: SamplerState, settings: Settings, stop: Tensor, model: int = 0) -> None:
        """Queue the sequences that have steps below ``stop [N]`` left, and give the first ones to the slots.

        With a router, only those that wait for this `model`.
        """
        self.pace[: len(stop), 2] = stop
        self.kept.zero_()
        if state.attention_mask is not None and settings.block_length is not None:  # blocks of padding are never read
            text = state.attention_mask.int().argmax(-1)
            self.kept.copy_(text - text % settings.block_length)
        scratch = len(self.start) - 1
        everyone = torch.arange(scratch + 1, device=self.start.device)
        masked = ((state.input_ids == settings.mask_id) & self.wanted).sum(-1)
        eligible = (self.stop_reason == RUNNING) & (
            self.schedule_step(settings, masked, everyone, self.pace) < self.pace[:, 2]
        )
        if settings.router is not None:
            eligible &= self.route == model
        order = torch.argsort(~eligible, stable=True)
        self.queue.copy_(torch.where(everyone < eligible.sum(), order, scratch))
        places = torch.arange(len(self.slot), device=self.slot.device).clamp(max=scratch)
        self.slot.copy_(self.queue[places])
        self.next.fill_(len(self.slot))
        self.status.copy_(torch.stack(((self.slot != scratch).sum(), masked.sum())))
