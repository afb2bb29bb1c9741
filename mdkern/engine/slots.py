"""What the slots of step-by-step decoding work on in one step, and the `View` of it that the decoder is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdkern.decoders.base import View
from mdkern.engine.progress import Progress, Settings
from mdkern.engine.state import SamplerState


@dataclass
class Slots:
    """What the slots work on in one step."""

    sequence: Tensor  # int64 [B], N: none
    active: Tensor  # bool [B]
    column: Tensor  # int64 [B, R], columns of the block, clamped to the sequence
    inside: Tensor  # bool [B, R], whether the column is in the sequence
    ids: Tensor  # int64 [B, L]
    pace: Tensor  # int64 [B, 3], see `Progress`
    view: View


def observe(settings: Settings, state: SamplerState, progress: Progress) -> Slots:
    """The slots' sequences, and the decoder's `View` of them."""
    sequence = progress.slot
    column, inside = window(settings, progress, state.input_ids.shape[1])
    ids = state.input_ids[sequence]
    left = ((ids == settings.mask_id) & progress.wanted[sequence]).sum(-1)
    pace = progress.pace[sequence]
    view = look(settings, state, progress, ids, column, inside, left, pace)
    return Slots(sequence, sequence != len(progress.start) - 1, column, inside, ids, pace, view)


def window(settings: Settings, progress: Progress, length: int) -> tuple[Tensor, Tensor]:
    """Columns of each slot's block, int64 ``[B, R]`` clamped to the sequence, and whether they lie in it, bool."""
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
    pace: Tensor,
) -> View:
    """The decoder's `View` of the slots' blocks."""
    sequence = progress.slot
    inner = ids.gather(1, column)
    ours = progress.wanted[sequence].gather(1, column) & inside
    steps, block_steps, _ = pace.unbind(-1)
    step = torch.minimum(progress.schedule_step(settings, left, sequence, pace), steps - 1)
    key_step = progress.passes[sequence] if settings.decoder.adaptive else step
    if not settings.decoder.fresh_noise:
        key_step = torch.zeros_like(key_step)
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
        steps=steps,
        block_step=progress.block_step[sequence],
        block_steps=block_steps,
        block_masked=progress.block_masked[sequence],
        confidence=progress.confidence[sequence].gather(1, column),
        seed=state.seed,
        keys=keys,
    )


def attended(state: SamplerState, slots: Slots) -> Tensor | None:
    """What is no padding in the slots' sequences, bool ``[B, L]``; None: all."""
    return None if state.attention_mask is None else state.attention_mask[slots.sequence]


def places(slots: Slots, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Flat indices of the slots' blocks into tensors ``[N + 1, L]``, int64 ``[B, R]``, and where they are in blocks.

    Elsewhere they are those of scratch.
    """
    inside = slots.inside & slots.active[:, None]
    return torch.where(inside, slots.sequence[:, None] * length + slots.column, (rows - 1) * length), inside
