"""Decoding of block-causal models with a KV cache that is exact: no block sees those after it.

Keys and values of a finished block depend on its tokens and the blocks before it, so that they are computed once. Each
step runs one block of each slot. If the keys and values of an earlier one are not yet final, because it has just been
finished or belongs to the prompt, the step is a *commit*: it runs that block with its tokens and reveals nothing. Else
it decodes. (Those that the last decoding step left are not final: its input still had masks.) All steps have one shape
and slots need not wait for each other, so that one graph runs a segment. A change of model, or of a slot's sequence,
begins with the first block.

The tokens are those of decoding without a cache, to rounding. A sequence with P tokens given before its first mask and
n blocks to write takes ``P // B + n - 1`` commits.
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
from mdkern.engine.slots import Slots
from mdkern.engine.state import SamplerState
from mdkern.engine.stepwise import SegmentRun, decode_tick, run_segment
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head


def decode_segment(segment: SegmentRun, bar: tqdm, drafts: Drafts) -> None:
    """Run a segment's steps, each a pass over one block of each sequence."""
    run_segment(segment, bar, drafts, "block", partial(block_tick, cache=keys_and_values(segment)))


def block_tick(
    denoiser: Denoiser,
    head: Head,
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    model: int,
    cache: Tensor,
) -> None:
    """`decode_tick`, in which a slot with an earlier block to commit has no work; its pass runs that block."""
    assert settings.block_length is not None
    sequence, none = progress.slot.clone(), len(progress.start) - 1
    first = progress.start[sequence] + progress.block[sequence] * settings.block_length
    commits = progress.kept[sequence] < first
    first = torch.minimum(first, progress.kept[sequence])
    progress.slot.copy_(torch.where(commits, none, sequence))

    def forward(
        denoiser: Denoiser, settings: Settings, state: SamplerState, progress: Progress, slots: Slots
    ) -> Tensor:
        run = replace(slots, sequence=sequence, ids=state.input_ids[sequence], column=first[:, None])
        return windows(denoiser, settings, state, progress, run, cache, settings.block_length)

    decode_tick(denoiser, head, settings, state, progress, model, forward)
    progress.slot.copy_(torch.where(commits, sequence, progress.slot))
    progress.kept.index_add_(0, sequence, commits.long() * settings.block_length)
    progress.nfe[model].index_add_(0, sequence, commits.long())
    progress.commits[model].index_add_(0, sequence, commits.long())
    progress.count_slots()
