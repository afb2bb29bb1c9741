"""Step-by-step decoding: the loop for decoders that look at the model's output before they say what is revealed.

Each of B slots works on one sequence; a slot whose sequence has finished the segment takes the next one from the queue.
The step and block of each sequence, what is masked, and which sequence a slot has are all kept on the device. One call
of `decode_tick` runs one forward pass and updates them without the host, until a flag says that no slot has work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.decoders.base import Proposal, View
from mdkern.decoders.checks import check_answers, check_rows, copied, copied_proposal
from mdkern.engine.advance import advance, block_is_over
from mdkern.engine.failures import explain, has_failed
from mdkern.engine.graphs import Workspace
from mdkern.engine.hooks import Drafts, guided_hidden
from mdkern.engine.pacing import run_steps, watcher
from mdkern.engine.progress import Progress, Settings
from mdkern.engine.propose import Propose, propose_drawn
from mdkern.engine.request import Request
from mdkern.engine.slots import Slots, attended, observe, places
from mdkern.engine.soft import soften, softened
from mdkern.engine.state import (
    FAILED,
    RUNNING,
    IncompleteError,
    Outcome,
    SamplerState,
    Timings,
)
from mdkern.kernels.loop.select import select
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head
from mdkern.plan import GIVEN


@dataclass(frozen=True)
class SegmentRun:
    """A segment of a run, with all that the loop over its steps needs."""

    denoiser: Denoiser
    model: int  # its number in `Progress.nfe`
    stop: Tensor  # int64 [N], each sequence's last step plus 1
    settings: Settings
    state: SamplerState
    progress: Progress
    workspace: Workspace | None


def run(
    request: Request,
    state: SamplerState,
    workspace: Workspace | None,
    bar: tqdm,
    drafts: Drafts,
    timings: Timings,
    decode: Callable[[SegmentRun, tqdm, Drafts], None] | None = None,
) -> Outcome:
    """Run a request, segment after segment. `decode` runs the steps of one; default `decode_segment`."""
    settings = Settings.of(request)
    progress = prepare(request, settings, state, workspace)
    count = len(request.input_ids)
    if bar.total is None:
        bar.reset(total=int(progress.total.sum()))
    bar.unit = "token"
    timings.lap("plan")
    failure: Exception | None = None

    def by_model(counts: Tensor) -> dict[str, Tensor]:
        return {name: counts[number, :count].clone() for number, name in enumerate(request.denoisers)}

    def outcome() -> Outcome:
        return Outcome(
            progress.reveal_step[:count].clone(),
            progress.reveal_model[:count].clone(),
            progress.confidence[:count].log().masked_fill(progress.reveal_model[:count] == GIVEN, torch.nan),
            by_model(progress.nfe),
            progress.stop_reason[:count].clone(),
            failure,
            by_model(progress.commits) if request.cache == "block" else None,
        )

    try:
        for name, stop in turns(request, progress):
            denoiser, number = request.denoisers[name], list(request.denoisers).index(name)
            segment = SegmentRun(denoiser, number, stop, settings, state, progress, workspace)
            (decode or decode_segment)(segment, bar, drafts)
            if has_failed(state):
                failure = failure or explain_first(request, name, settings, state, progress)
            timings.lap(name)
    except BaseException as error:
        raise IncompleteError(outcome) from error
    return outcome()


def turns(request: Request, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """The models in the order in which they run, and up to which step, int64 ``[N]``.

    They are the schedule's segments or, with a router, always the model for which most sequences wait.
    """
    if request.router is None:
        for part, name in enumerate(request.parts):
            first, stop = request.edges[:, part], request.edges[:, part + 1]
            if bool((stop > first).any()):  # with few steps, a share may be none
                yield name, stop
        return
    names = list(request.denoisers)
    while True:
        waiting = progress.route[progress.stop_reason == RUNNING]
        if not len(waiting):
            return
        least, most = waiting.min().item(), waiting.max().item()
        if least < 0 or most >= len(names):
            raise ValueError(
                f"{type(request.router).__name__}: route must return numbers of the models {', '.join(names)},"
                f" 0 to {len(names) - 1}, but there are some from {least} to {most}"
            )
        yield names[int(waiting.bincount(minlength=len(names)).argmax())], request.steps


def explain_first(
    request: Request, name: str, settings: Settings, state: SamplerState, progress: Progress
) -> Exception:
    """The reason why the first sample that failed has no tokens."""
    row = (progress.stop_reason == FAILED).nonzero()[:1, 0]
    masked = (state.input_ids[row] == settings.mask_id) & progress.wanted[row]
    passes = int(progress.passes[row])
    if settings.most_passes is not None and passes >= settings.most_passes:
        return RuntimeError(
            f"sample {int(request.sample_ids[row])}: after {passes} passes {type(settings.decoder).__name__} has left"
            f" {int(masked.sum())} masks: wherever something is masked, its choose must reveal at least one position"
        )
    step = progress.schedule_step(settings, masked.sum(-1), row, progress.pace[row])
    step = step - (0 if settings.decoder.adaptive else 1)
    just_now = progress.wanted[row] & (progress.reveal_step[row] == step[:, None])
    ids = torch.where(just_now, settings.mask_id, state.input_ids[row])[0]
    position = (masked | just_now)[0].nonzero()[:, 0]
    return explain(request, name, int(row), int(step), ids, position, float(progress.time(row, step)))


def prepare(request: Request, settings: Settings, state: SamplerState, workspace: Workspace | None) -> Progress:
    """The request's progress at its start; with a workspace, in the tensors that its graphs use."""
    rows, length = state.input_ids.shape
    # Powers of two, so that runs of similar numbers of steps share graphs.
    kinds, longest = (1 << (n - 1).bit_length() for n in (request.steps.unique().numel(), request.most_steps + 1))
    shape = min(request.batch_size, len(request.input_ids)), len(request.denoisers), (kinds, longest)
    allocate = partial(Progress.allocate, rows - 1, length, *shape, request.device)
    progress = allocate() if workspace is None else workspace.part(("progress", *shape), allocate)
    progress.load(request, settings)
    return progress


def decode_segment(segment: SegmentRun, bar: tqdm, drafts: Drafts, propose: Propose | None = None) -> None:
    """Run a segment's steps, each a pass over whole sequences. `propose`: see `decode_tick`; only without graphs."""
    assert propose is None or segment.workspace is None
    run_segment(segment, bar, drafts, "decode", partial(decode_tick, propose=propose))


def run_segment(
    segment: SegmentRun,
    bar: tqdm,
    drafts: Drafts,
    kind: str,
    tick: Callable[..., None],
    begin: Callable[[], None] | None = None,
) -> None:
    """Run a segment's steps until no slot has work.

    Args:
        kind: names the step in the key of its graph.
        tick: `decode_tick`, or a step like it.
        begin: called before the first step, if there is one.
    """
    denoiser, settings, state, progress = segment.denoiser, segment.settings, segment.state, segment.progress
    step = partial(tick, denoiser, settings=settings, state=state, progress=progress, model=segment.model)
    graph = None
    if segment.workspace is not None:
        key = kind, settings.key(), progress.key(), segment.model
        graph = segment.workspace.graph(
            denoiser, key, step, progress.idle, loop_while=progress.status, rehearsed=settings.keeps_nothing
        )
    progress.begin_segment(state, settings, segment.stop, segment.model)
    running, left = progress.status.tolist()
    if running:
        progress.report.copy_(progress.status)
        if begin is not None:
            begin()
        head, watch = denoiser.head, watcher(progress, left, bar, drafts)
        run_steps(graph, partial(step, head), progress, watch, in_step=head.shard is not None)


def decode_tick(
    denoiser: Denoiser,
    head: Head,
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    model: int,
    forward: Callable[[Denoiser, Settings, SamplerState, Progress, Slots], Tensor] | None = None,
    propose: Propose | None = None,
) -> None:
    """`decode_slots`, and the host learns how many slots have work."""
    decode_slots(denoiser, head, settings, state, progress, model, forward, propose)
    progress.tell()


def decode_slots(
    denoiser: Denoiser,
    head: Head,
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    model: int,
    forward: Callable[[Denoiser, Settings, SamplerState, Progress, Slots], Tensor] | None = None,
    propose: Propose | None = None,
) -> None:
    """Run one forward pass for every slot, and apply what the decoder decides.

    All data are read from and written to device tensors; only the shapes come from the host, so that it can be
    captured.

    Args:
        denoiser, head: the model to run.
        model: its number in `Progress.nfe`.
        forward: computes the hidden states of the slots' blocks, ``[B, R, D]``. Default: `whole_sequences`.
        propose: makes the proposal that the decoder is given, and the tokens to reveal. Default: `propose_drawn`.
    """
    slots = observe(settings, state, progress)
    rows = wanted_rows(settings, slots.view) & slots.active[:, None]
    hidden = (forward or whole_sequences)(denoiser, settings, state, progress, slots)
    shown, revealed = (propose or propose_drawn)(head, settings, state, slots, rows, hidden)
    changed, new, failed, settled = decide(settings, state, slots, rows, shown, revealed.token)
    write(state, progress, slots, new, changed, revealed.probability, model)
    progress.nfe[model].index_add_(0, slots.sequence, slots.active.long())
    progress.passes.index_add_(0, slots.sequence, slots.active.long())
    if settings.router is not None:
        progress.route[slots.sequence] = settings.router.asked(slots.view, shown, model)
    over = block_is_over(settings, progress, slots, new, changed, settled)
    if settings.decoder.soft:
        soften(settings, progress, slots, new, shown.probability, over)
    advance(settings, state, progress, slots, over, failed, model)


def wanted_rows(settings: Settings, view: View) -> Tensor:
    """Where the decoder wants statistics, bool ``[B, R]``."""
    if settings.most_passes is None:
        return settings.decoder.rows(view)
    return check_rows(settings.decoder, view, settings.decoder.rows(copied(view)))


def whole_sequences(
    denoiser: Denoiser, settings: Settings, state: SamplerState, progress: Progress, slots: Slots
) -> Tensor:
    """Hidden states of the slots' blocks, ``[B, R, D]``, from a pass over whole sequences."""
    return guided_hidden(
        softened(denoiser, settings, progress, slots.sequence, slots.column),
        settings.guidance_scale,
        slots.ids,
        state.given[slots.sequence] if settings.guidance_scale else None,
        progress.time(slots.sequence, slots.view.step) if denoiser.time_conditioning else None,
        None if settings.block_length is None else slots.column,
        attended(state, slots),
    )


def decide(
    settings: Settings, state: SamplerState, slots: Slots, rows: Tensor, proposal: Proposal, token: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Apply the decoder's rules to a proposal.

    Args:
        token: int64 ``[B, R]``, the tokens to reveal where the decoder says so; below 0 where none could be drawn.

    Returns:
        The entries that take their token, bool ``[B, R]``; the block's ids after the step, int64 ``[B, R]``; the slots
        whose logits had a NaN, bool ``[B]``; and those whose block is settled, bool ``[B]``, or None.
    """
    decoder, view = settings.decoder, slots.view
    failed = (rows & (token < 0)).any(-1)
    state.failed |= failed.any()
    shown = view
    if settings.most_passes is not None:
        shown, proposal = copied(view), copied_proposal(proposal)
    choice = decoder.choose(shown, proposal)
    edited, remasked = decoder.edit(shown, proposal), decoder.remask(shown)
    settled = decoder.settled(shown, proposal) if settings.settles else None
    if settings.most_passes is not None:
        check_answers(decoder, view, choice, edited, remasked, settled)
    new = view.ids.clone()
    changed = select(
        choice.scores,
        choice.candidates & view.masked,
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
        changed = changed | (edited & view.revealed & (token >= 0))
        new = torch.where(changed, token, new)
    if remasked is not None:
        new = torch.where(remasked & view.revealed, settings.mask_id, new)
    return changed, new, failed, settled


def write(
    state: SamplerState,
    progress: Progress,
    slots: Slots,
    new: Tensor,
    changed: Tensor,
    probability: Tensor,
    model: int,
) -> None:
    """Write the step's outcome to the state; entries outside of the blocks go to scratch."""
    rows, length = state.input_ids.shape
    target, inside = places(slots, rows, length)
    state.input_ids.view(-1)[target] = torch.where(inside, new, 0)
    at = torch.where(changed, target, (rows - 1) * length)
    progress.confidence.view(-1)[at] = probability
    progress.reveal_step.view(-1)[at] = slots.view.step[:, None].expand_as(at)
    progress.reveal_model.view(-1)[at] = torch.full_like(at, model)  # a Python number would be copied from the host
