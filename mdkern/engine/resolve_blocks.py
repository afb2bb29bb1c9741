"""The blocks and steps of each sequence of a call, from the arguments and the models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.engine.checks import check_count
from mdkern.plan import positions_in_text
from mdkern.schedule import Schedule

MOST_STEPS = 1 << 24  # beyond, two steps may have the same float32 time


def resolve_blocks(block_length: Any, denoisers: Mapping[str, Any], attention_mask: Tensor | None) -> tuple[Any, bool]:
    """The block length, and whether it is that of block-causal models, whose blocks are counted over the whole text.

    Args:
        denoisers: denoisers by name, or whatever else has `Denoiser.block_causal`.

    Raises:
        ValueError: blocks or padding that do not fit the models.
    """
    own = {name: denoiser.block_causal for name, denoiser in denoisers.items() if denoiser.block_causal is not None}
    if not own:
        return block_length, False
    name, blocks = next(iter(own.items()))
    differing = [other for other in own if own[other] != blocks]
    if differing:
        raise ValueError(
            f"models must share the length of their blocks: {name} sees blocks of {blocks}, {differing[0]} of"
            f" {own[differing[0]]}"
        )
    if block_length is not None and block_length != blocks:
        raise ValueError(
            f"block_length must be {blocks}, not {block_length!r}: model {name} sees the blocks of {blocks} up to a"
            " position's own, so that they are written one after the other. Leave it out"
        )
    if attention_mask is not None:
        column = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        moved = attention_mask & ((positions_in_text(attention_mask) - column) % blocks != 0)
        if bool(moved.any()):
            raise ValueError(
                f"attention_mask has padding before text that shifts it against the blocks of {blocks} of model {name}:"
                f" pad on the right (tokenizer.padding_side = 'right'), or on the left by a multiple of {blocks}"
            )
    return blocks, True


class Pace(NamedTuple):
    """Blocks and steps of each sequence. Each row of the tensors depends on that sequence alone."""

    block_length: int | None  # None: one block
    blocks: Tensor  # int64 [N]
    start: Tensor  # int64 [N], the column from which blocks are counted
    steps: Tensor  # int64 [N], T
    most_steps: int
    edges: Tensor  # int64 [N, P + 1], the step at which each of the schedule's P parts begins, and T


def resolve_pace(
    schedule: Schedule,
    steps: int | None,
    block_length: Any,
    steps_per_block: Any,
    wanted: Tensor,
    attention_mask: Tensor | None,
    keep_block: bool = False,
    whole_text: bool = False,
) -> Pace:
    """Work out the blocks and steps of each sequence.

    Blocks are counted from a sequence's first masked position, or over the whole text. The default of the steps is the
    schedule's total, or else the number of positions of the sequence's blocks, or of its text if there are no blocks.

    Args:
        wanted: bool ``[N, L]``, the masked positions.
        attention_mask: bool ``[N, L]``, or None.
        keep_block: keep `block_length` even if one block holds all that is masked.
        whole_text: count the blocks from column 0.
    """
    if block_length is None and steps_per_block is not None:
        raise ValueError("steps_per_block needs a block_length, e.g. 32: without blocks, give steps")
    if steps is not None and steps_per_block is not None:
        raise ValueError("steps and steps_per_block must not both be given: the one says the other")
    if steps is not None:
        schedule.edges(steps)  # refuses steps that contradict a schedule of step counts
    count, length = wanted.shape
    first = wanted.int().argmax(-1)
    given = steps or schedule.total
    if block_length is None:
        own = wanted.new_full((count,), length, dtype=torch.int64) if attention_mask is None else attention_mask.sum(-1)
        blocks, start = torch.ones_like(own), first
    else:
        block_length = check_count("block_length", block_length)
        start = first - first % block_length if whole_text else first
        end = length - wanted.flip(-1).int().argmax(-1)  # behind the last masked position
        span, blocks = end - first, (end - start + block_length - 1) // block_length
        own = blocks * span.clamp(max=block_length)
        block_length = min(block_length, length) if keep_block or int(blocks.max()) > 1 else None
    if steps_per_block is not None:
        own = blocks * check_count("steps_per_block", steps_per_block)
    elif given is not None:
        own = torch.full_like(own, given)
        check_steps(given, blocks)
    most = int(own.max())
    if most > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS} for a sequence, not {most}")
    return Pace(block_length, blocks, start, own, most, fit_schedule(schedule, own))


def check_steps(steps: int, blocks: Tensor) -> None:
    """Refuse a number of steps that is not a multiple of some sequence's number of blocks."""
    uneven = (steps % blocks).nonzero()[:, 0].tolist()
    if uneven:
        number = int(blocks[uneven[0]])
        raise ValueError(
            f"steps must be a multiple of the {number} blocks of row {uneven[0]}, not {steps}: "
            f"e.g. {max(1, steps // number) * number}, or give steps_per_block"
        )


def fit_schedule(schedule: Schedule, steps: Tensor) -> Tensor:
    """`Pace.edges` of a schedule over ``steps [N]`` of each sequence, int64 ``[N, P + 1]``."""
    each, which = steps.unique(return_inverse=True)
    if schedule.total is not None and each.tolist() != [schedule.total]:
        row = int((steps != schedule.total).nonzero()[0, 0])
        own = int(steps[row])
        raise ValueError(f"schedule {schedule} has {schedule.total} steps, but row {row} has {own}: make them agree")
    return torch.tensor([schedule.edges(count) for count in each.tolist()], device=steps.device)[which]
