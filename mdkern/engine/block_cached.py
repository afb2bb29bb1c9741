"""Decoding of block-causal models with a KV cache that is exact: no block sees those after it.

Keys and values of a finished block depend on its tokens and the blocks before it, so that they are computed once. Those
that the last decoding step left are not final: its input still had masks. Each step runs a window of ``n`` blocks of
each slot, from the first block whose keys and values are not final, and makes those final that it runs with all their
tokens. If the block to be decoded is in the window, the step decodes it; else it is a *commit*, which reveals nothing.
All steps have one shape and slots need not wait for each other, so that one graph runs a segment. A change of model, or
of a slot's sequence, begins with the first block.

The tokens are those of decoding without a cache, to rounding. A sequence with P tokens given before its first mask and
m blocks to write takes ``P // B // n`` commits, and with n = 1 another m - 1. Long prompts are *filled in* instead: the
first pass of a segment runs whole sequences, and counts as one commit of each that has a long prompt. Sequences that
take a slot over later do without.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.engine.cached import keys_and_values, windows
from mdkern.engine.hooks import Drafts
from mdkern.engine.progress import Progress, Settings
from mdkern.engine.slots import Slots, observe
from mdkern.engine.state import SamplerState
from mdkern.engine.stepwise import SegmentRun, decode_slots, run_segment
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head

FREE_COLUMNS = 64  # of a pass on a GPU, which waits for the weights: docs/notes/block-causal.md
LONG_PROMPT = 8  # commits in place of which a prompt is filled in, as they would take longer
MOST_FILLED = 1 << 16  # rows of a pass that fills in


def decode_segment(segment: SegmentRun, bar: tqdm, drafts: Drafts) -> None:
    """Run a segment's steps, each a pass over one block of each sequence, or over a few."""
    blocks, cache = blocks_of_window(segment), keys_and_values(segment)
    tick = partial(block_tick, cache=cache, blocks=blocks)
    run_segment(segment, bar, drafts, f"{blocks} blocks", tick, partial(fill_in, segment, cache, blocks))


def fill_in(segment: SegmentRun, cache: Tensor, blocks: int) -> None:
    """Make the keys and values of long prompts of the slots' sequences final in one pass, at a segment's start."""
    settings, state, progress, model = segment.settings, segment.state, segment.progress, segment.model
    assert settings.block_length is not None
    sequence, none = progress.slot, len(progress.start) - 1
    first = progress.start[sequence] + progress.block[sequence] * settings.block_length
    behind = (first - progress.kept[sequence]).clamp(min=0) // settings.block_length
    long = (behind >= LONG_PROMPT * blocks) & (sequence != none)
    columns = len(sequence) * state.input_ids.shape[1] * (2 if settings.guidance_scale else 1)
    if columns > MOST_FILLED or not bool(long.any()):
        return
    windows(segment.denoiser, settings, state, progress, observe(settings, state, progress), cache, None)
    progress.kept.copy_(progress.kept.scatter(0, sequence, torch.where(long, first, progress.kept[sequence])))
    for counts in (progress.nfe, progress.commits):
        counts[model].index_add_(0, sequence, long.long())


def blocks_of_window(segment: SegmentRun) -> int:
    """Number of blocks that a step runs: as many as cost nothing on a GPU, where batches and blocks are small."""
    block_length, state = segment.settings.block_length, segment.state
    assert block_length is not None
    if not state.input_ids.is_cuda:
        return 1
    rows = len(segment.progress.slot) * (2 if segment.settings.guidance_scale else 1)
    return max(1, min(FREE_COLUMNS // (rows * block_length), -(-state.input_ids.shape[1] // block_length)))


def block_tick(
    denoiser: Denoiser,
    head: Head,
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    model: int,
    cache: Tensor,
    blocks: int = 1,
) -> None:
    """`decode_slots` over windows of `blocks` blocks, in which a slot that only commits has no work."""
    length = settings.block_length
    assert length is not None
    sequence, none = progress.slot.clone(), len(progress.start) - 1
    kept, first = progress.kept[sequence], progress.start[sequence] + progress.block[sequence] * length
    behind = (first - kept).clamp(min=0)  # columns that are to be made final before the block
    commits = behind >= blocks * length
    progress.slot.copy_(torch.where(commits, none, sequence))

    def forward(
        denoiser: Denoiser, settings: Settings, state: SamplerState, progress: Progress, slots: Slots
    ) -> Tensor:
        column = torch.minimum(first, kept)[:, None]
        run = replace(slots, sequence=sequence, ids=state.input_ids[sequence], column=column)
        offset = None if blocks == 1 else behind.clamp(max=(blocks - 1) * length)
        return windows(denoiser, settings, state, progress, run, cache, blocks * length, offset)

    decode_slots(denoiser, head, settings, state, progress, model, forward)
    progress.slot.copy_(torch.where(commits, sequence, progress.slot))
    progress.kept.index_add_(0, sequence, behind.clamp(max=blocks * length))
    progress.nfe[model].index_add_(0, sequence, commits.long())
    progress.commits[model].index_add_(0, sequence, commits.long())
    progress.count_slots()
    progress.tell()
