"""Sampling by a reveal plan: the loop of decoders whose order does not depend on the model.

Every step that reveals something is known beforehand, so a tick is one forward pass of a full batch, with the output
layer at just the rows that get their token.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.decoders import Canvas, Planned
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

LOOKS = 16  # for ends of text, in a run without blocks


def run(
    request: Request, state: SamplerState, workspace: Workspace | None, bar: tqdm, drafts: Drafts, timings: Timings
) -> Outcome:
    """All of a request: draw the plan, then segment after segment."""
    plan = draw_plan(request, state)
    model = torch.full_like(plan.step, GIVEN)
    ended = torch.zeros(len(plan.step), dtype=torch.bool, device=request.device)
    filled_at = torch.full_like(plan.step, GIVEN)  # the step before which a position was filled with the end of text
    failed, failure = torch.zeros_like(ended), None
    nfe = {name: torch.zeros_like(request.sample_ids) for name in request.denoisers}
    if bar.total is None:
        bar.reset(total=int(plan.events().sum()))
    timings.lap("plan")

    def outcome() -> Outcome:
        left = (request.masked & (state.input_ids[: len(ended)] == request.mask_id)).any(-1)
        reason = torch.where(ended, END_OF_TEXT, torch.where(left, RUNNING, ALL_REVEALED))
        reason = torch.where(failed, FAILED, reason)
        return Outcome(torch.maximum(plan.step, filled_at), model, nfe, reason, failure)

    try:
        for name, first, stop in pieces(request):
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
            end = min(stop, request.steps)
            if stops(request) and (end == request.steps or end % look_steps(request) == 0):
                block_ends = end % (request.steps // request.blocks) == 0
                plan, now, tail = stop_texts(request, state, plan, ~ended, block_ends)
                ended |= now
                model[tail] = GIVEN
                filled_at[tail] = stop - 1
            timings.lap(name)
    except BaseException as error:
        raise IncompleteError(outcome) from error
    return outcome()


def explain_first(
    request: Request, name: str, state: SamplerState, plan: RevealPlan, unwritten: Tensor
) -> FloatingPointError:
    """Why a pass of a denoiser gave no token: of the first sample with an ``unwritten [N, L]`` position."""
    row = int(unwritten.any(-1).nonzero()[0, 0])
    order = (plan.step if plan.order is None else plan.order)[row]
    event = order[unwritten[row]].min()
    position = (unwritten[row] & (order == event)).nonzero()[:, 0]
    step = int(plan.step[row, position[0]])
    ids = torch.where((plan.step[row] != GIVEN) & (order >= event), request.mask_id, state.input_ids[row])
    time = request.decoder.times(request.steps)[step] if plan.time is None else plan.time[row, position[0]]
    return explain(request, name, row, step, ids, position, float(time))


def stops(request: Request) -> bool:
    """Whether a text may end before its last step."""
    return request.stop_at_eos or request.stopping_criteria is not None


def look_steps(request: Request) -> int:
    """Steps between two looks for ends of text: those of a block or, without blocks, a share of all."""
    block_steps = request.steps // request.blocks
    return -(-request.steps // LOOKS) if request.blocks == 1 and request.stop_at_eos else block_steps


def pieces(request: Request) -> list[tuple[str, int, int]]:
    """(denoiser, first, stop) of each segment, cut where ends of text are looked for.

    The closing pass, step T, goes to the last one.
    """
    cuts = {segment.stop for segment in request.segments}
    if stops(request):
        cuts |= set(range(0, request.steps, look_steps(request)))
    out = []
    for segment in request.segments:
        inside = sorted({segment.first, segment.stop, *(c for c in cuts if segment.first < c < segment.stop)})
        out += [(segment.model, first, stop) for first, stop in pairwise(inside)]
    name, first, stop = out[-1]
    return [*out[:-1], (name, first, stop + 1)]


def draw_plan(request: Request, state: SamplerState) -> RevealPlan:
    """When each position is revealed."""
    assert isinstance(request.decoder, Planned)
    masked = request.masked
    count, length = masked.shape
    block = torch.zeros_like(request.input_ids)
    if request.block_length is not None:
        column = torch.arange(length, device=masked.device)
        start = masked.int().argmax(-1, keepdim=True)
        block = torch.where(masked, (column - start) // request.block_length, 0)
    canvas = Canvas(
        masked, block, request.blocks, request.steps, state.seed, state.sample[:count], state.text_position[:count]
    )
    plan = request.decoder.plan(canvas)
    step = plan.step
    if step.shape != masked.shape or bool((masked != ((step >= 0) & (step <= plan.steps))).any()):
        raise ValueError(
            f"{type(request.decoder).__name__}: plan must give every masked position a step from 0 to {request.steps}"
            f" and all others {GIVEN}"
        )
    return plan


def reveal_tick(
    denoiser: Denoiser, head: Head, request: Request, state: SamplerState, ticks: Ticks, batch: int, capacity: int
) -> None:
    """Run tick ``state.tick``: one forward pass of `batch` sequences, the head at `capacity` rows, tokens written.

    Everything is read from and written to device tensors; the host gives shapes only. `batch` and `capacity` must be
    at least the tick's own.
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
    end_tick(state.input_ids, state.failed, state.tick, statistics.token, inputs.target, inputs.row_count)


def run_steps(
    request: Request,
    denoiser: Denoiser,
    state: SamplerState,
    plan: RevealPlan,
    first: int,
    stop: int,
    workspace: Workspace | None,
    bar: tqdm,
    drafts: Drafts,
) -> None:
    """The events of steps ``first <= i < stop``: replayed if there is a workspace and the denoiser can be captured."""
    times = request.decoder.times(request.steps).to(request.device, torch.float32)
    ticks = plan.ticks(first, stop, request.batch_size, times, int if workspace is None else bucket)
    if ticks is None:
        return
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


def bucket(size: int) -> int:
    """The power of two at or above, at least 4: graphs are captured for few shapes."""
    return 1 << max(2, (size - 1).bit_length())


def captured_ticks(
    denoiser: Denoiser, request: Request, ticks: Ticks, workspace: Workspace
) -> tuple[TickBuffer, dict[int, torch.cuda.CUDAGraph]] | None:
    """The buffer that a segment's ticks are loaded into, and a graph for each batch size; None if not capturable."""
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

        key = "reveal", *shape, size, request.filters, request.guidance_scale
        graph = workspace.graph(denoiser, key, step, idle)
        if graph is None:
            return None
        graphs[size] = graph.captured
    return buffer, graphs


def stop_texts(
    request: Request, state: SamplerState, plan: RevealPlan, running: Tensor, block_ends: bool
) -> tuple[RevealPlan, Tensor, Tensor]:
    """End the ``running [N]`` texts that have an end of text with no mask before it, or that the criteria stop.

    Returns:
        The plan without what is left of them; which they are, bool ``[N]``; and what follows their end, bool
        ``[N, L]``, which is filled in now.
    """
    ids, wanted = state.input_ids[: len(plan.step)], request.masked
    criteria, ended = request.stopping_criteria, torch.zeros_like(running)
    if criteria is not None and block_ends:
        numbers = torch.arange(len(ids), device=ids.device)
        ended, cut = criteria.stop(ids, wanted, request.attention_mask, request.mask_id, numbers, running)
        ids.copy_(cut)
    end = find_end(ids, wanted, request.mask_id, request.eos_ids if request.stop_at_eos else ())
    ended = (ended | end.known) & running
    filled, tail = fill_tail(ids, wanted, end, ended, request.eos_ids[0])
    ids.copy_(filled)
    return replace(plan, step=plan.step.masked_fill(tail, GIVEN)), ended, tail
