"""What follows a step: blocks and texts end, and slots whose sequences are finished take the next ones."""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.engine.end_of_text import fill_tail, find_end
from mdkern.engine.progress import Progress, Settings
from mdkern.engine.slots import Slots, attended
from mdkern.engine.state import ALL_REVEALED, END_OF_TEXT, FAILED, RUNNING, SamplerState
from mdkern.plan import GIVEN


def stop_texts(settings: Settings, state: SamplerState, progress: Progress, slots: Slots, final: Tensor) -> Tensor:
    """End the texts that have an end of text or that stopping criteria end; fill what follows with end of text.

    Args:
        final: bool ``[B]``, whether revealed tokens can no longer change.

    Returns:
        bool ``[B]``: the slots whose texts were ended.
    """
    sequence, ids = slots.sequence, state.input_ids[slots.sequence]
    wanted, ended, criteria = progress.wanted[sequence], torch.zeros_like(final), settings.stopping_criteria
    if criteria is not None:
        asked = final & slots.active
        ended, ids = criteria.stop(ids, wanted, attended(state, slots), settings.mask_id, sequence, asked)
    end = find_end(ids, wanted, settings.mask_id, settings.eos_ids if settings.stop_at_eos else ())
    ended = (ended | (end.known & final)) & slots.active
    filled, tail = fill_tail(ids, wanted, end, ended, settings.eos_ids[0])
    state.input_ids[sequence] = filled
    progress.reveal_step[sequence] = torch.where(tail, slots.view.step[:, None], progress.reveal_step[sequence])
    progress.reveal_model[sequence] = torch.where(tail, GIVEN, progress.reveal_model[sequence])
    return ended


def advance(
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    slots: Slots,
    over: Tensor,  # bool [B], of `block_is_over`
    failed: Tensor,  # bool [B]
    model: int,
) -> None:
    """Move sequences to their next step or block, and slots to their next sequence.

    `slots.sequence` has the next ones then.
    """
    sequence, active = slots.sequence, slots.active
    ended = torch.zeros_like(over)
    if settings.stop_at_eos or settings.stopping_criteria is not None:
        # Only the current block is edited or remasked, so the text of finished blocks is final.
        ended = stop_texts(settings, state, progress, slots, over if settings.rewrites else active)
    masked = (state.input_ids[sequence] == settings.mask_id) & progress.wanted[sequence]  # [B, L]
    left = masked.sum(-1)
    if settings.most_passes is not None:
        stuck = (left > 0) & (progress.passes[sequence] >= settings.most_passes)
        state.failed |= (stuck & active).any()
        failed = failed | stuck
    finished = (over & (left == 0)) | ended | failed
    begin_blocks(settings, progress, slots, masked, left, over & ~finished)
    reason = torch.where(ended, END_OF_TEXT, torch.where(finished, ALL_REVEALED, RUNNING))
    reason = torch.where(failed, FAILED, reason)
    progress.stop_reason[sequence] = torch.where(active, reason, ALL_REVEALED)
    if settings.router is None:
        beyond = progress.schedule_step(settings, left, sequence, slots.pace) >= slots.pace[:, 2]
    else:
        beyond = progress.route[sequence] != model
    refill(settings, state, progress, active & (finished | beyond), model)


def block_is_over(
    settings: Settings,
    progress: Progress,
    slots: Slots,
    new: Tensor,
    changed: Tensor,
    settled: Tensor | None,
) -> Tensor:
    """Whether the slots' blocks are over, bool ``[B]``."""
    decoder, view = settings.decoder, slots.view
    has_masks = ((new == settings.mask_id) & (view.masked | view.revealed)).any(-1)
    block_step = view.block_step + 1
    if settled is not None:
        return ~has_masks & (settled | ~changed.any(-1) | (block_step >= progress.block_limit[slots.sequence]))
    if decoder.adaptive:
        stays = ~view.masked.any(-1) & ~changed.any(-1)
        return ~has_masks & ((closing_passes(progress, slots) >= decoder.closing_steps) | stays)
    steps_done = block_step >= view.block_steps
    return steps_done if settings.remasks else ~has_masks | steps_done


def closing_passes(progress: Progress, slots: Slots) -> Tensor:
    """Passes over the slots' blocks that found no mask there, this one included, int64 ``[B]``."""
    return progress.closing[slots.sequence] + ~slots.view.masked.any(-1)


def begin_blocks(
    settings: Settings,
    progress: Progress,
    slots: Slots,
    masked: Tensor,  # bool [B, L]
    left: Tensor,  # [B], how many those are
    moves: Tensor,  # bool [B]: the sequences that begin another block
) -> None:
    """Count the step, in the same block or in that of the first mask that is left."""
    sequence, view = slots.sequence, slots.view
    if settings.block_length is None:
        next_block, next_masked = progress.block[sequence], left
    else:
        first = masked.int().argmax(-1)
        next_block = torch.where(left > 0, (first - progress.start[sequence]) // settings.block_length, 0)
        column = torch.arange(masked.shape[1], device=masked.device)
        end = progress.start[sequence] + (next_block + 1) * settings.block_length
        next_masked = (masked & (column < end[:, None])).sum(-1)
    progress.block[sequence] = torch.where(moves, next_block, progress.block[sequence])
    progress.block_masked[sequence] = torch.where(moves, next_masked, view.block_masked)
    progress.block_step[sequence] = torch.where(moves, 0, view.block_step + 1)
    progress.closing[sequence] = torch.where(moves, 0, closing_passes(progress, slots))


def refill(settings: Settings, state: SamplerState, progress: Progress, leaves: Tensor, model: int) -> None:
    """Give the slots whose sequences leave, bool ``[B]``, the next ones of the queue, and count what is left to do."""
    scratch = len(progress.start) - 1
    place = (progress.next + leaves.cumsum(0) - 1).clamp(max=scratch)
    progress.slot.copy_(torch.where(leaves, progress.queue[place], progress.slot))
    progress.next += leaves.sum()
    masked_in_all = ((state.input_ids == settings.mask_id) & progress.wanted).sum()
    running = (progress.slot != scratch).sum()
    if settings.router is not None:  # half-empty batches wait until more sequences want this model
        others = ((progress.stop_reason == RUNNING) & (progress.route != model)).sum()
        running = torch.where((2 * running < len(progress.slot)) & (others > 0), 0, running)
    progress.status.copy_(torch.stack((running, masked_in_all)))
