"""Sampling by a reveal plan: the loop for decoders whose order does not depend on the model.

The steps that reveal something are known beforehand, so each tick is one forward pass of a full batch, with the output
layer at exactly the rows that get their token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.decoders import Canvas, Planned
from mdkern.decoders.checks import times_of
from mdkern.engine.end_of_text import fill_tail, find_end
from mdkern.engine.failures import explain, has_failed
from mdkern.engine.graphs import Pacer, Workspace
from mdkern.engine.hooks import Drafts, Texts, guided_hidden, row_statistics
from mdkern.engine.request import Request
from mdkern.engine.state import (
    ALL_REVEALED,
    END_OF_TEXT,
    FAILED,
    RUNNING,
    IncompleteError,
    Outcome,
    SamplerState,
    TickBuffer,
    Timings,
)
from mdkern.kernels.loop.tick import TickSource, begin_tick, end_tick
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head
from mdkern.plan import GIVEN, RevealPlan, Ticks

LOOKS = 16  # times that a run without blocks looks for ends of text


def run(
    request: Request, state: SamplerState, workspace: Workspace | None, bar: tqdm, drafts: Drafts, timings: Timings
) -> Outcome:
    """Run a request: draw the plan, then run segment after segment."""
    plan = draw_plan(request, state)
    model = torch.full_like(plan.step, GIVEN)
    ended = torch.zeros(len(plan.step), dtype=torch.bool, device=request.device)
    filled_at = torch.full_like(plan.step, GIVEN)  # step before which a position was filled with end of text
    failed, failure = torch.zeros_like(ended), None
    nfe = {name: torch.zeros_like(request.sample_ids) for name in request.denoisers}
    if bar.total is None:
        bar.reset(total=int(plan.events().sum()))
    timings.lap("plan")

    def outcome() -> Outcome:
        left = (request.masked & (state.input_ids[: len(ended)] == request.mask_id)).any(-1)
        reason = torch.where(ended, END_OF_TEXT, torch.where(left, RUNNING, ALL_REVEALED))
        reason = torch.where(failed, FAILED, reason)
        log_prob = state.log_prob[: len(ended)].masked_fill(model == GIVEN, torch.nan)
        return Outcome(torch.maximum(plan.step, filled_at), model, log_prob, nfe, reason, failure)

    try:
        for piece in pieces(request):
            name, first, stop = piece.model, piece.first, piece.stop
            nfe[name] += plan.events(first, stop)
            model[(plan.step >= first) & (plan.step < stop)] = list(nfe).index(name)
            run_steps(request, request.denoisers[name], state, plan, first, stop, workspace, bar, drafts)
            if has_failed(state):
                unwritten = (
                    (plan.step >= first) & (plan.step < stop) & (state.input_ids[: len(ended)] == request.mask_id)
                )
                failure = failure or explain_first(request, name, state, plan, unwritten)
                failed |= unwritten.any(-1)
                plan = replace(plan, step=plan.step.masked_fill(failed[:, None], GIVEN))
            if piece.looks is not None:
                plan, now, tail = stop_texts(request, state, plan, piece.looks & ~ended, piece.block_ends)
                ended |= now
                model[tail] = GIVEN
                filled_at = torch.where(tail, stop - 1, filled_at)
            timings.lap(name)
    except BaseException as error:
        raise IncompleteError(outcome) from error
    return outcome()


def explain_first(
    request: Request, name: str, state: SamplerState, plan: RevealPlan, unwritten: Tensor
) -> FloatingPointError:
    """The reason why a pass gave no token, for the first sample with an ``unwritten [N, L]`` position."""
    row = int(unwritten.any(-1).nonzero()[0, 0])
    order = (plan.step if plan.order is None else plan.order)[row]
    event = order[unwritten[row]].min()
    position = (unwritten[row] & (order == event)).nonzero()[:, 0]
    step = int(plan.step[row, position[0]])
    ids = torch.where((plan.step[row] != GIVEN) & (order >= event), request.mask_id, state.input_ids[row])
    time = request.decoder.times(int(request.steps[row]))[step] if plan.time is None else plan.time[row, position[0]]
    return explain(request, name, row, step, ids, position, float(time))


def stops(request: Request) -> bool:
    """Whether a text may end before its last step."""
    return request.stop_at_eos or request.stopping_criteria is not None


@dataclass(frozen=True)
class Piece:
    """A part of a run in which one denoiser runs and no text is ended."""

    model: str
    first: Tensor  # int64 [N, 1], each sequence's first step
    stop: Tensor  # int64 [N, 1], its last step plus 1
    looks: Tensor | None  # bool [N], the sequences in which an end of text is looked for after it; None: in none
    block_ends: Tensor | None  # bool [N], the sequences that end a block with it, for stopping criteria; None: none


def pieces(request: Request) -> Iterator[Piece]:
    """The schedule's parts, cut further where ends of text are looked for.

    Those are the ends of a sequence's blocks or, without blocks, the ends of equal shares of its steps. The closing
    pass, step T, goes to the last part that has steps.
    """
    steps, blocks, edges = request.steps.cpu()[:, None], request.blocks.cpu()[:, None], request.edges.cpu()
    edges = torch.where(edges == steps, steps + 1, edges)
    stride = steps // blocks  # between two looks
    if request.stop_at_eos:
        stride = torch.where(blocks == 1, -(-steps // LOOKS), stride)
    windows = int((-(-steps // stride)).max()) if stops(request) else 1
    for part, model in enumerate(request.parts):
        for window in range(windows):
            first, stop, end = edges[:, part, None], edges[:, part + 1, None], steps + 1
            if stops(request):
                begin, end = (torch.where(stride * n < steps, stride * n, steps + 1) for n in (window, window + 1))
                first, stop = torch.maximum(first, begin), torch.minimum(stop, end)
            if not bool((first < stop).any()):
                continue
            looks = ((first < stop) & (stop == end))[:, 0] if stops(request) else None
            block_ends = None if looks is None else looks & ((blocks > 1) | (end > steps))[:, 0]

            def placed(rows: Tensor | None) -> Tensor | None:
                return rows.to(request.device) if rows is not None and bool(rows.any()) else None

            yield Piece(model, first.to(request.device), stop.to(request.device), placed(looks), placed(block_ends))


def draw_plan(request: Request, state: SamplerState) -> RevealPlan:
    """Draw when each position is revealed."""
    assert isinstance(request.decoder, Planned)
    masked = request.masked
    count, length = masked.shape
    block = torch.zeros_like(request.input_ids)
    if request.block_length is not None:
        column = torch.arange(length, device=masked.device)
        block = torch.where(masked, (column - request.start[:, None]) // request.block_length, 0)
    counts = request.blocks[:, None], request.steps[:, None]
    plan: Any = request.decoder.plan(
        Canvas(masked, block, *counts, state.seed, state.sample[:count], state.text_position[:count])
    )
    if not isinstance(plan, RevealPlan) or plan.step.dtype != torch.int64:
        given = f"steps of {plan.step.dtype}" if isinstance(plan, RevealPlan) else type(plan).__name__
        raise ValueError(f"{type(request.decoder).__name__}: plan must return a RevealPlan of int64, not {given}")
    step, steps = plan.step, request.steps[:, None]
    if step.shape != masked.shape or bool((masked != ((step >= 0) & (step <= steps))).any()):
        raise ValueError(
            f"{type(request.decoder).__name__}: plan must give every masked position a step from 0"
            f" to {int(steps.max())} and all others {GIVEN}"
        )
    if plan.time is None and any(denoiser.time_conditioning for denoiser in request.denoisers.values()):
        plan = replace(plan, time=times_of_steps(request, plan.step))
    return plan


def times_of_steps(request: Request, step: Tensor) -> Tensor:
    """float32 ``[N, L]``: the diffusion time of ``step [N, L]`` of each sequence."""
    time = torch.ones_like(step, dtype=torch.float32)
    for steps in request.steps.unique().tolist():
        times = times_of(request.decoder, steps).to(step.device, torch.float32)
        rows = (request.steps == steps).nonzero()[:, 0]
        time[rows] = times[step[rows].clamp(min=0)]
    return time


def reveal_tick(
    denoiser: Denoiser, head: Head, request: Request, state: SamplerState, ticks: Ticks, batch: int, capacity: int
) -> None:
    """Run tick number ``state.tick``: one forward pass of `batch` sequences, the head at `capacity` rows, the tokens.

    All data are read from and written to device tensors; only the shapes come from the host, so the function can be
    captured. `batch` and `capacity` must be at least the tick's own numbers.
    """
    source = TickSource(
        state.input_ids,
        state.attention_mask,
        state.text_position,
        state.sample,
        state.temperature,
        state.closing_step,
        ticks.sequence,
        ticks.step,
        ticks.time,
        ticks.position,
        ticks.row,
        ticks.row_count,
        state.tick,
    )
    inputs = begin_tick(source, batch, capacity)
    given = None
    if request.guidance_scale:
        given = state.given[ticks.sequence.index_select(0, state.tick)[0, :batch]]
    hidden = guided_hidden(
        denoiser,
        request.guidance_scale,
        inputs.input_ids,
        given,
        inputs.time if denoiser.time_conditioning else None,
        inputs.positions,
        inputs.attention_mask,
    )
    statistics = row_statistics(
        request.logits_processor,
        head,
        hidden,
        Texts(inputs.input_ids, inputs.attention_mask, inputs.positions, denoiser.mask_id),
        inputs.row,
        inputs.row_count,
        inputs.temperature,
        state.seed,
        inputs.keys,
        **request.filters._asdict(),
    )
    if request.record:
        state.log_prob.view(-1)[inputs.target] = statistics.log_prob
    end_tick(state.input_ids, state.failed, state.tick, statistics.token, inputs.target, inputs.row_count)


def run_steps(
    request: Request,
    denoiser: Denoiser,
    state: SamplerState,
    plan: RevealPlan,
    first: Tensor,
    stop: Tensor,
    workspace: Workspace | None,
    bar: tqdm,
    drafts: Drafts,
) -> None:
    """Run the events of each sequence's steps ``first <= i < stop``, int64 ``[N, 1]``.

    They are replayed from graphs if there is a workspace and the denoiser can be captured.
    """
    for part in plan.by_crowding(first, stop):
        ticks = part.ticks(first, stop, request.batch_size, int if workspace is None else workspace.round_up)
        if ticks is not None:
            run_ticks(request, denoiser, state, ticks, workspace, bar, drafts)


def run_ticks(
    request: Request,
    denoiser: Denoiser,
    state: SamplerState,
    ticks: Ticks,
    workspace: Workspace | None,
    bar: tqdm,
    drafts: Drafts,
) -> None:
    """Run ticks one after the other, eagerly or from graphs."""
    replays = None if workspace is None else captured_ticks(denoiser, request, ticks, workspace)
    if replays is None:
        state.tick.zero_()
        for batch, rows in zip(ticks.batch, ticks.rows):
            reveal_tick(denoiser, denoiser.head, request, state, ticks, batch, rows)
            bar.update(batch)
            drafts.show()
        return
    buffer, graphs = replays
    pacer, start = Pacer(), 0
    while start < len(ticks):
        count = buffer.load(ticks, start)
        state.tick.zero_()
        for batch, size in zip(ticks.batch[start : start + count], ticks.size[start : start + count]):
            graphs[size].replay()
            bar.update(batch)
            if pacer.replayed():
                drafts.show()
        start += count


def captured_ticks(
    denoiser: Denoiser, request: Request, ticks: Ticks, workspace: Workspace
) -> tuple[TickBuffer, dict[int, torch.cuda.CUDAGraph]] | None:
    """The buffer for a segment's ticks, and a graph for each batch size; None if the step cannot be captured."""
    slots, width, rows = ticks.sequence.shape[1], ticks.position.shape[2], ticks.row.shape[1]
    shape = slots, width, rows
    scratch, device = len(workspace.state.sample) - 1, workspace.state.sample.device
    buffer = workspace.part(("ticks", *shape), partial(TickBuffer, *shape, scratch, device))
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    for size in sorted(set(ticks.size)):
        step = partial(
            reveal_tick,
            denoiser,
            request=request,
            state=workspace.state,
            ticks=buffer.ticks,
            batch=size,
            capacity=rows,
        )

        def idle() -> None:
            buffer.idle()
            workspace.state.tick.zero_()

        key = "reveal", *shape, size, request.filters, request.guidance_scale, request.record
        graph = workspace.graph(denoiser, key, step, idle)
        if graph is None:
            return None
        graphs[size] = graph.captured
    return buffer, graphs


def stop_texts(
    request: Request, state: SamplerState, plan: RevealPlan, running: Tensor, block_ends: Tensor | None
) -> tuple[RevealPlan, Tensor, Tensor]:
    """End those of the ``running [N]`` texts that have an end of text with no mask before it.

    The stopping criteria are called for the texts of which a block has ended.

    Returns:
        The plan without the rest of these texts; which texts they are, bool ``[N]``; and the positions after their end,
        bool ``[N, L]``, which have been filled in.
    """
    ids, wanted = state.input_ids[: len(plan.step)], request.masked
    criteria, asked_to_end = request.stopping_criteria, torch.zeros_like(running)
    if criteria is not None and block_ends is not None:
        numbers = torch.arange(len(ids), device=ids.device)
        asked = running & block_ends
        ended, cut = criteria.stop(ids, wanted, request.attention_mask, request.mask_id, numbers, asked)
        asked_to_end = ended & asked
        ids.copy_(cut)
    end = find_end(ids, wanted, request.mask_id, request.eos_ids if request.stop_at_eos else ())
    ended = (asked_to_end | end.known) & running
    filled, tail = fill_tail(ids, wanted, end, ended, request.eos_ids[0])
    ids.copy_(filled)
    return replace(plan, step=plan.step.masked_fill(tail, GIVEN)), ended, tail
