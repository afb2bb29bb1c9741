"""Decoding step by step: the loop of decoders that look at the model before they say what is revealed.

B slots each work on a sequence; a slot whose sequence has left the segment takes the next one of the queue. Which step
of which block a sequence is at, what is masked, which sequence a slot has: all of it is on the device, and one call of
`decode_tick` moves it on by one forward pass without asking the host, until a flag says that no slot has work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.arguments import Filters, Request
from mdkern.decoders.base import Proposal, Stepwise, View
from mdkern.graphs import Graph, Workspace
from mdkern.kernels import vocab_projection
from mdkern.kernels.compact import compact
from mdkern.kernels.select import select
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head
from mdkern.planned import report_failure
from mdkern.state import ALL_REVEALED, END_OF_TEXT, RUNNING, Outcome, SamplerState, Timings

LAG = 2  # replays between a step and the host's look at its flag: the device always has work


@dataclass(frozen=True)
class Settings:
    """What is the same at every step of a run."""

    decoder: Stepwise
    filters: Filters
    steps: int  # T
    block_length: int | None  # None: one block, the whole sequence
    block_steps: int  # T / blocks
    mask_id: int
    eos_id: int | None  # where a block that ends with it ends the sequence; None: nowhere

    @staticmethod
    def of(request: Request) -> Settings:
        assert isinstance(request.decoder, Stepwise)
        return Settings(
            decoder=request.decoder,
            filters=request.filters,
            steps=request.steps,
            block_length=request.block_length,
            block_steps=request.steps // request.blocks,
            mask_id=request.mask_id,
            eos_id=request.eos_id if request.stop_at_eos else None,
        )

    @property
    def remasks(self) -> bool:
        return type(self.decoder).remask is not Stepwise.remask

    def key(self) -> Hashable:
        """What tells settings apart; decoders are compared by their parameters, tensors among them by address."""
        parameters = tuple(getattr(self.decoder, field.name) for field in fields(self.decoder))  # type: ignore[arg-type]
        known = tuple(value.data_ptr() if isinstance(value, Tensor) else value for value in parameters)
        rest = self.steps, self.block_length, self.block_steps, self.mask_id, self.eos_id
        return type(self.decoder), known, self.filters, rest


@dataclass
class Progress:
    """Where the sequences are, beside their ids: device tensors, row N of those over sequences scratch."""

    wanted: Tensor  # bool [N + 1, L], masked at the start: what may be written
    start: Tensor  # int64 [N + 1], first wanted column, where blocks are counted from
    total: Tensor  # int64 [N + 1], wanted columns
    block: Tensor  # int64 [N + 1]
    block_step: Tensor  # int64 [N + 1]
    block_masked: Tensor  # int64 [N + 1], masked columns of the block when it began
    closing: Tensor  # int64 [N + 1], passes of the block after its last mask
    passes: Tensor  # int64 [N + 1], forward passes so far
    nfe: Tensor  # int64 [models, N + 1]
    stop_reason: Tensor  # int64 [N + 1], RUNNING at first
    confidence: Tensor  # float32 [N + 1, L]
    reveal_step: Tensor  # int64 [N + 1, L], -1 where given
    reveal_model: Tensor  # int64 [N + 1, L]
    slot: Tensor  # int64 [B], the sequence each slot works on; N: none
    queue: Tensor  # int64 [N + 1], the segment's sequences, N after the last
    next: Tensor  # int64 [], place in the queue
    stop: Tensor  # int64 [], the segment's last step, plus 1
    times: Tensor  # float32 [T + 1]
    status: Tensor  # int64 [2]: slots that have work, masked columns of all sequences
    report: Tensor  # int64 [2], on the host: a copy of `status` that comes after each tick

    @staticmethod
    def allocate(sequences: int, length: int, batch: int, models: int, steps: int, device: torch.device) -> Progress:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, grid = sequences + 1, (sequences + 1, length)
        return Progress(
            wanted=zeros(*grid, dtype=torch.bool),
            start=zeros(rows),
            total=zeros(rows),
            block=zeros(rows),
            block_step=zeros(rows),
            block_masked=zeros(rows),
            closing=zeros(rows),
            passes=zeros(rows),
            nfe=zeros(models, rows),
            stop_reason=zeros(rows),
            confidence=zeros(*grid, dtype=torch.float32),
            reveal_step=zeros(*grid),
            reveal_model=zeros(*grid),
            slot=zeros(batch),
            queue=zeros(rows),
            next=zeros(),
            stop=zeros(),
            times=zeros(steps + 1, dtype=torch.float32),
            status=zeros(2),
            report=torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda"),
        )

    def load(self, request: Request, settings: Settings) -> None:
        """Start the request: its sequences in the first rows, each at its first block."""
        for field in fields(self):
            getattr(self, field.name).zero_()
        count, wanted = len(request.input_ids), request.masked
        self.wanted[:count] = wanted
        self.start[:count] = wanted.int().argmax(-1)
        self.total[:] = self.wanted.sum(-1)
        self.confidence.fill_(1.0)
        self.reveal_step.fill_(-1)
        self.reveal_model.fill_(-1)
        self.stop_reason[count:] = ALL_REVEALED
        self.times.copy_(request.decoder.times(request.steps))
        self.idle()
        if settings.block_length is None:
            self.block_masked.copy_(self.total)
        else:
            column = torch.arange(wanted.shape[1], device=wanted.device)
            inside = column < self.start[:, None] + settings.block_length
            self.block_masked.copy_((self.wanted & inside).sum(-1))

    def idle(self) -> None:
        """Give no slot any work."""
        self.slot.fill_(len(self.start) - 1)

    def schedule_step(self, settings: Settings, masked: Tensor, sequence: Tensor) -> Tensor:
        """int64 ``[B]``: which of the T steps a sequence with `masked` columns left is at."""
        if not settings.decoder.adaptive:
            return self.block[sequence] * settings.block_steps + self.block_step[sequence]
        total = self.total[sequence]
        share = (total - masked) * settings.steps // total.clamp(min=1)
        return share.clamp(max=settings.steps - 1)

    def begin_segment(self, state: SamplerState, settings: Settings, stop: int) -> None:
        """Queue the sequences that have steps below `stop` to run, and give the first ones to the slots."""
        scratch = len(self.start) - 1
        everyone = torch.arange(scratch + 1, device=self.start.device)
        masked = ((state.input_ids == settings.mask_id) & self.wanted).sum(-1)
        eligible = (self.stop_reason == RUNNING) & (self.schedule_step(settings, masked, everyone) < stop)
        order = torch.argsort(~eligible, stable=True)
        self.queue.copy_(torch.where(everyone < eligible.sum(), order, scratch))
        places = torch.arange(len(self.slot), device=self.slot.device).clamp(max=scratch)
        self.slot.copy_(self.queue[places])
        self.next.fill_(len(self.slot))
        self.stop.fill_(stop)
        self.status.copy_(torch.stack(((self.slot != scratch).sum(), masked.sum())))


def run(request: Request, state: SamplerState, workspace: Workspace | None, bar: tqdm, timings: Timings) -> Outcome:
    """All of a request, segment after segment."""
    settings = Settings.of(request)
    progress = prepare(request, settings, state, workspace)
    count = len(request.input_ids)
    bar.reset(total=int(progress.total.sum()))
    bar.unit = "token"
    timings.lap("plan")
    for segment in request.segments:
        denoiser, number = request.denoisers[segment.model], list(request.denoisers).index(segment.model)
        step = partial(decode_tick, denoiser, settings=settings, state=state, progress=progress, model=number)
        graph = None
        if workspace is not None:
            key = "decode", settings.key(), len(progress.slot), progress.nfe.shape[0], number
            graph = workspace.graph(denoiser, key, step, progress.idle, loop_while=progress.status)
        progress.begin_segment(state, settings, segment.stop)
        run_segment(graph, partial(step, denoiser.head), progress, bar)
        report_failure(denoiser, state)
        timings.lap(segment.model)
    return Outcome(
        progress.reveal_step[:count].clone(),
        progress.reveal_model[:count].clone(),
        {name: progress.nfe[number, :count].clone() for number, name in enumerate(request.denoisers)},
        progress.stop_reason[:count].clone(),
    )


def prepare(request: Request, settings: Settings, state: SamplerState, workspace: Workspace | None) -> Progress:
    """The request's progress at its start, at the addresses of the workspace's graphs if it has one."""
    rows, length = state.input_ids.shape
    shape = min(request.batch_size, len(request.input_ids)), len(request.denoisers), request.steps
    allocate = partial(Progress.allocate, rows - 1, length, *shape, request.device)
    progress = allocate() if workspace is None else workspace.part(("progress", *shape), allocate)
    progress.load(request, settings)
    return progress


def run_segment(graph: Graph | None, step: Callable[[], None], progress: Progress, bar: tqdm) -> None:
    """Steps until no slot has work: one launch where the device can loop, else replays of the graph, else eagerly."""
    running, left = progress.status.tolist()
    if not running:
        return
    progress.report.copy_(progress.status)

    def watch() -> None:
        nonlocal left
        now = int(progress.report[1])
        bar.update(left - now)
        left = now

    if graph is not None and graph.loop is not None:
        graph.loop.run(watch)
    else:
        run_one_by_one(step if graph is None else graph.captured.replay, progress, watch)
    watch()


def run_one_by_one(step: Callable[[], None], progress: Progress, watch: Callable[[], None]) -> None:
    """Steps until the flag says that no slot has work. On a GPU the host looks `LAG` steps late: it never idles."""
    events: deque[torch.cuda.Event] = deque()
    while True:
        step()
        if progress.status.is_cuda:
            events.append(torch.cuda.Event())
            events[-1].record()
            if len(events) <= LAG:
                continue
            events.popleft().synchronize()
        watch()
        if not int(progress.report[0]):
            return


def decode_tick(
    denoiser: Denoiser, head: Head, settings: Settings, state: SamplerState, progress: Progress, model: int
) -> None:
    """One forward pass of every slot, and what the decoder makes of it.

    Everything is read from and written to device tensors; the host gives shapes only.

    Args:
        denoiser, head: whose pass it is; `model` is its number in `Progress.nfe`.
    """
    decoder, scratch, sequence = settings.decoder, len(progress.start) - 1, progress.slot
    length = state.input_ids.shape[1]
    active = sequence != scratch  # [B]
    column, inside = window(settings, progress, length)  # [B, R]
    ids = state.input_ids[sequence]  # [B, L]
    left = ((ids == settings.mask_id) & progress.wanted[sequence]).sum(-1)
    view = look(settings, state, progress, ids, column, inside, left)

    wanted_rows = decoder.rows(view) & active[:, None]
    row, row_count = compact(wanted_rows)
    attention_mask = None if state.attention_mask is None else state.attention_mask[sequence]
    time = progress.times[view.step] if denoiser.time_conditioning else None
    positions = None if settings.block_length is None else column
    hidden = denoiser.hidden(ids, time, positions, attention_mask)  # [B, R, D]
    statistics = vocab_projection(
        hidden.flatten(0, 1),
        head.weight,
        head.bias,
        row,
        state.temperature.expand(len(row)),
        state.seed,
        view.keys.flatten(0, 1)[row],
        row_count=row_count,
        scale=head.scale,
        soft_cap=head.soft_cap,
        want_top=decoder.wants_top,
        want_entropy=decoder.wants_entropy,
        **settings.filters._asdict(),
    )
    used = torch.arange(len(row), device=row.device) < row_count

    def spread(values: Tensor | None, missing: float) -> Tensor | None:
        """Row statistics back in their places, ``[B, R]``."""
        if values is None:
            return None
        places = values.new_full((len(row) + 1,), missing)
        places[torch.where(used, row, len(row))] = values  # the extra place takes what is past `row_count`
        return places[:-1].view(column.shape)

    token = spread(statistics.token, -1)
    assert token is not None
    proposal = Proposal(
        token,
        spread(statistics.log_prob.exp(), torch.nan),  # type: ignore[arg-type]
        spread(statistics.top1, torch.nan),
        spread(statistics.top2, torch.nan),
        spread(statistics.entropy, torch.nan),
    )
    failed = (wanted_rows & (token < 0)).any(-1)
    state.failed |= failed.any()

    choice = decoder.choose(view, proposal)
    edited, remasked = decoder.edit(view, proposal), decoder.remask(view)
    new = view.ids.clone()
    changed = select(
        choice.scores,
        choice.candidates & active[:, None],
        token,
        new,
        choice.rule,
        quota=choice.quota,
        bound=choice.bound,
        temperature=choice.temperature,
        seed=state.seed if choice.temperature > 0.0 else None,
        keys=view.keys if choice.temperature > 0.0 else None,
    )
    if edited is not None:
        changed = changed | (edited & active[:, None])
        new = torch.where(changed, token, new)
    if remasked is not None:
        new = torch.where(remasked & active[:, None], settings.mask_id, new)
    write(state, progress, view, sequence, column, inside & active[:, None], new, changed, proposal, model)
    progress.nfe[model].index_add_(0, sequence, active.long())
    progress.passes.index_add_(0, sequence, active.long())
    advance(settings, state, progress, view, new, changed, failed)
    state.tick += 1


def window(settings: Settings, progress: Progress, length: int) -> tuple[Tensor, Tensor]:
    """Columns of each slot's block, int64 ``[B, R]`` held inside the sequence, and whether they are, bool."""
    device = progress.slot.device
    if settings.block_length is None:
        column = torch.arange(length, device=device).expand(len(progress.slot), length)
        return column, torch.ones_like(column, dtype=torch.bool)
    first = progress.start[progress.slot] + progress.block[progress.slot] * settings.block_length
    column = first[:, None] + torch.arange(settings.block_length, device=device)
    return column.clamp(max=length - 1), column < length


def look(
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    ids: Tensor,
    column: Tensor,
    inside: Tensor,
    left: Tensor,
) -> View:
    """What the decoder is shown."""
    sequence = progress.slot
    inner = ids.gather(1, column)
    ours = progress.wanted[sequence].gather(1, column) & inside
    step = progress.schedule_step(settings, left, sequence).clamp(max=settings.steps - 1)
    key_step = progress.passes[sequence] if settings.decoder.adaptive else step
    origin = progress.start[sequence]
    if settings.block_length is not None:
        origin = origin + progress.block[sequence] * settings.block_length
    keys = torch.stack(
        (
            state.sample[sequence][:, None].expand_as(column),
            state.text_position[sequence].gather(1, column),
            key_step[:, None].expand_as(column),
        ),
        dim=-1,
    )
    return View(
        ids=inner,
        masked=(inner == settings.mask_id) & ours,
        revealed=(inner != settings.mask_id) & ours,
        offset=column - origin[:, None],
        step=step,
        steps=settings.steps,
        block_step=progress.block_step[sequence],
        block_steps=settings.block_steps,
        block_masked=progress.block_masked[sequence],
        times=progress.times,
        confidence=progress.confidence[sequence].gather(1, column),
        seed=state.seed,
        keys=keys,
    )


def write(
    state: SamplerState,
    progress: Progress,
    view: View,
    sequence: Tensor,
    column: Tensor,
    inside: Tensor,
    new: Tensor,
    changed: Tensor,
    proposal: Proposal,
    model: int,
) -> None:
    """The step's outcome into the state, everything outside the blocks into scratch."""
    rows, length = state.input_ids.shape
    target = torch.where(inside, sequence[:, None] * length + column, (rows - 1) * length)
    state.input_ids.view(-1)[target] = torch.where(inside, new, 0)
    at = torch.where(changed, target, (rows - 1) * length)
    progress.confidence.view(-1)[at] = proposal.probability
    progress.reveal_step.view(-1)[at] = view.step[:, None].expand_as(at)
    progress.reveal_model.view(-1)[at] = torch.full_like(at, model)  # a number would come from the host


def advance(
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    view: View,
    new: Tensor,
    changed: Tensor,
    failed: Tensor,
) -> None:
    """Sequences to their next step or block, slots to their next sequence."""
    decoder, scratch, sequence = settings.decoder, len(progress.start) - 1, progress.slot
    active = sequence != scratch
    had_masks = view.masked.any(-1)
    has_masks = ((new == settings.mask_id) & (view.masked | view.revealed)).any(-1)
    closing = progress.closing[sequence] + ~had_masks
    block_step = view.block_step + 1
    if decoder.adaptive:
        over = ~has_masks & ((closing >= decoder.closing_steps) | (~had_masks & ~changed.any(-1)))
    elif settings.remasks:
        over = block_step >= settings.block_steps
    else:
        over = ~has_masks | (block_step >= settings.block_steps)

    ids = state.input_ids[sequence]  # [B, L]
    ours = progress.wanted[sequence]
    if settings.eos_id is not None:
        ended = over & ((new == settings.eos_id) & view_ours(view)).any(-1)
        rest = (ids == settings.mask_id) & ours & (ended & active)[:, None]
        ids = torch.where(rest, settings.eos_id, ids)
        state.input_ids[sequence] = ids
        reveal_step = progress.reveal_step[sequence]
        progress.reveal_step[sequence] = torch.where(rest, view.step[:, None], reveal_step)
    else:
        ended = torch.zeros_like(over)
    masked = (ids == settings.mask_id) & ours
    left = masked.sum(-1)
    finished = (over & (left == 0)) | ended | failed
    if settings.block_length is None:
        next_block, next_masked = progress.block[sequence], left
    else:
        first = masked.int().argmax(-1)
        next_block = torch.where(left > 0, (first - progress.start[sequence]) // settings.block_length, 0)
        column = torch.arange(ids.shape[1], device=ids.device)
        end = progress.start[sequence] + (next_block + 1) * settings.block_length
        next_masked = (masked & (column < end[:, None])).sum(-1)
    moves = over & ~finished
    progress.block[sequence] = torch.where(moves, next_block, progress.block[sequence])
    progress.block_masked[sequence] = torch.where(moves, next_masked, view.block_masked)
    progress.block_step[sequence] = torch.where(moves, 0, block_step)
    progress.closing[sequence] = torch.where(moves, 0, closing)
    reason = torch.where(ended, END_OF_TEXT, torch.where(finished, ALL_REVEALED, RUNNING))
    progress.stop_reason[sequence] = torch.where(active, reason, ALL_REVEALED)

    beyond = progress.schedule_step(settings, left, sequence) >= progress.stop
    leaves = active & (finished | beyond)
    place = (progress.next + leaves.cumsum(0) - 1).clamp(max=scratch)
    progress.slot.copy_(torch.where(leaves, progress.queue[place], sequence))
    progress.next += leaves.sum()
    masked_in_all = ((state.input_ids == settings.mask_id) & progress.wanted).sum()
    progress.status.copy_(torch.stack(((progress.slot != scratch).sum(), masked_in_all)))
    progress.report.copy_(progress.status, non_blocking=True)


def view_ours(view: View) -> Tensor:
    """bool ``[B, R]``: what the sampler writes in the block."""
    return view.masked | view.revealed
