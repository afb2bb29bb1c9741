"""Shared by the planned decoders: a keyed uniform number for each position, ranks within a block, steps of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mdkern.decoders.base import Canvas
from mdkern.kernels import noise
from mdkern.plan import GIVEN, RevealPlan


def uniforms(canvas: Canvas) -> Tensor:
    """float64 ``[N, L]`` in (0, 1): the draw of each position, which does not depend on the rest of the canvas."""
    zero = torch.zeros((), dtype=torch.int64, device=canvas.masked.device)
    return noise.uniform(
        *noise.random_bits(canvas.seed, canvas.sample[:, None], canvas.position, zero, zero, noise.PLAN)
    )


def masked_blocks(canvas: Canvas) -> tuple[Tensor, Tensor, Tensor]:
    """For each position, int64 ``[N, L]``: its block, the number of masks in earlier blocks, and in its own block.

    Positions that are not masked are put into an extra block after the others.
    """
    most = int(canvas.blocks.max())
    block = torch.where(canvas.masked, canvas.block, most)
    sizes = torch.zeros(block.shape[0], most + 1, dtype=torch.int64, device=block.device)
    sizes.scatter_add_(1, block, torch.ones_like(block))
    return block, (sizes.cumsum(-1) - sizes).gather(-1, block), sizes.gather(-1, block)


def ranks(block: Tensor, keys: Tensor) -> Tensor:
    """int64 ``[N, L]``, 0..L-1: rank of each position by block, then by ascending key, then from left to right."""
    order = keys.argsort(dim=-1, stable=True)
    order = order.gather(-1, block.gather(-1, order).argsort(dim=-1, stable=True))
    return order.argsort(dim=-1)


def steps_of_run(canvas: Canvas, block_step: Tensor) -> Tensor:
    """int64 ``[N, L]``: the step of the run for a step within the block, clamped to the block's steps; or GIVEN."""
    block_steps = canvas.block_steps
    step = canvas.block * block_steps + torch.minimum(block_step.long(), block_steps - 1)
    return torch.where(canvas.masked, step, GIVEN)


def by_block_steps(canvas: Canvas, draw: Callable[[Canvas, int], Tensor]) -> Tensor:
    """int64 ``[N, L]``: the results of ``draw(canvas, block_steps)`` for each number of block steps."""
    counts = canvas.block_steps[:, 0]
    step = torch.empty_like(canvas.block)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        step[rows] = draw(canvas.only(rows), count)
    return step


def planned(canvas: Canvas, progress: Tensor) -> RevealPlan:
    """The plan that reveals each position in the step of its block into which ``progress [N, L]`` falls, in [0, 1)."""
    return RevealPlan(steps_of_run(canvas, (progress * canvas.block_steps).floor()), canvas.steps)
