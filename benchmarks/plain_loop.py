"""The loop of the decoders' public code: every step the model at every position, every logit in memory.

The rules that it runs are in `benchmarks.plain_decoders`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LogitsOf = Callable[[Tensor], Tensor]  # ids int64 [B, L] -> logits floating [B, L, V], -inf at ids never to be produced


@dataclass(frozen=True)
class Step:
    """What a rule is given: B sequences at one step of a block."""

    logits: Tensor  # [B, L, V]
    ids: Tensor  # int64 [B, L]
    masked: Tensor  # bool [B, L], the masks of the block
    wanted: Tensor  # bool [B, L], the positions of the block that were masked at first
    number: int  # number of the step within the block
    steps: int  # number of steps of the block
    columns: int  # number of columns of a block; without blocks, of the text
    quota: Tensor  # int64 [B, steps], see `even_quotas`
    mask_id: int
    temperature: float
    generator: torch.Generator


Rule = Callable[[Step], Tensor]  # the ids after the step


@dataclass(frozen=True)
class Plain:
    """A decoder: its rule, and when a block ends."""

    rule: Rule
    adaptive: bool = False  # over when nothing is masked, not after its steps
    closing_steps: int = 0  # of an adaptive one: further steps, until one changes nothing
    over: Callable[[Step, Tensor], bool] | None = None  # of the step and the ids after it: no further one is needed


def even_quotas(masked: Tensor, steps: int) -> Tensor:
    """LLaDA's table of ``masked [B, L]``, int64 ``[B, steps]``: an even share a step, the remainder to the first."""
    count = masked.sum(1)
    quota = (count // steps)[:, None].repeat(1, steps)
    for row in range(len(count)):
        quota[row, : int(count[row] % steps)] += 1
    return quota


@torch.no_grad()
def decode(
    logits_of: LogitsOf,
    ids: Tensor,
    decoder: Plain,
    *,
    steps: int,
    mask_id: int,
    block_length: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    most_steps: int | None = None,
    watch: Callable[[Tensor], None] = lambda ids: None,
) -> Tensor:
    """Decode one batch.

    Args:
        logits_of: the model.
        ids: int64 ``[B, L]``, masks from the same column on in every row.
        steps: T, a multiple of the number of blocks.
        block_length: columns of a block, from the first mask on. None: one block.
        most_steps: stop after so many forward passes, whatever is left. None: at the end.
        watch: called with the ids before each forward pass.

    Returns:
        The ids.
    """
    ids = ids.clone()
    generator = torch.Generator(ids.device).manual_seed(seed)
    all_wanted = ids == mask_id
    columns = all_wanted.any(0).nonzero()[:, 0]
    first, last = int(columns[0]), int(columns[-1]) + 1
    length = block_length or last - first
    block_steps = steps // -(-(last - first) // length)
    passes = 0
    for start in range(first, last, length):
        wanted = torch.zeros_like(all_wanted)
        wanted[:, start : start + length] = all_wanted[:, start : start + length]
        quota = even_quotas(wanted, block_steps)
        number = closing = 0
        while decoder.adaptive or number < block_steps:
            masked = wanted & (ids == mask_id)
            done = decoder.adaptive and not bool(masked.any())
            if (done and closing == decoder.closing_steps) or passes == most_steps:
                break
            watch(ids)
            shown = (
                masked,
                wanted,
                number,
                block_steps,
                block_length or ids.shape[1],
                quota,
                mask_id,
                temperature,
                generator,
            )
            step = Step(logits_of(ids), ids, *shown)
            new = decoder.rule(step)
            if decoder.over is not None and decoder.over(step, new):
                ids, passes = new, passes + 1
                break
            if done and torch.equal(new, ids):
                break
            ids, number, closing, passes = new, number + 1, closing + done, passes + 1
    return ids
