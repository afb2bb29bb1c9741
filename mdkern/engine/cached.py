"""Decoding in blocks with a KV cache (Fast-dLLM, Wu et al., 2505.22618): most passes run only a part of the text.

All slots work on one block each, and begin it together. The first step of a block is a *refresh*: a pass over the whole
sequences, which stores the keys and values of every column. The steps after it run a window of each sequence and attend
to the stored keys and values of the rest: with ``dual`` the window is the block, with ``prefix`` it is the block and
all that comes after it. A slot that has finished its block waits for the others, so that a sequence has the same passes
whoever is beside it. When all slots wait, the next round begins with a refresh. A change of model also begins with a
refresh, so keys and values of another model or sequence are never read.

The result approximates decoding without a cache: attention is bidirectional, so the stored keys and values are out of
date as soon as a token is revealed. It is exact for a block that takes one step, and for a window that is the whole
sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.engine.graphs import Graph
from mdkern.engine.hooks import Drafts, guided_hidden
from mdkern.engine.pacing import run_steps, watcher
from mdkern.engine.progress import Progress, Settings
from mdkern.engine.slots import Slots, attended
from mdkern.engine.soft import softened
from mdkern.engine.state import SamplerState
from mdkern.engine.stepwise import SegmentRun, decode_slots
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head


@dataclass(frozen=True)
class KVCache:
    """The KV cache, and which slots wait for the next refresh."""

    contents: Tensor  # keys and values, of the shape `Denoiser.cache_shape`
    waiting: Tensor  # int64 [B], the sequence with which each slot continues in the next round; N: none


def decode_segment(segment: SegmentRun, bar: tqdm, drafts: Drafts, *, dual: bool) -> None:
    """Run a segment's steps, round after round. The host synchronises once a round."""
    progress, settings = segment.progress, segment.settings
    assert settings.block_length is not None
    length = segment.state.input_ids.shape[1]
    kv_cache = prepare(segment)
    progress.begin_segment(segment.state, settings, segment.stop)
    wait_all(progress, kv_cache)
    progress.report.copy_(progress.status)
    watch = watcher(progress, int(progress.status[1]), bar, drafts)
    while True:
        busy, first = outlook(settings, progress, kv_cache, length).tolist()
        if not busy:
            return
        window = settings.block_length if dual else window_length(length - first, settings.block_length, length)
        # Graphs are captured before the slots have sequences, because capturing runs steps with idle slots.
        (refresh, refresh_step), (graph, step) = steps_of(segment, kv_cache, None), steps_of(segment, kv_cache, window)
        progress.slot.copy_(kv_cache.waiting)
        (refresh_step if refresh is None else refresh.captured.replay)()
        if progress.status.is_cuda or int(progress.status[0]):  # on a GPU, an idle step is cheaper than asking
            run_steps(graph, step, progress, watch, in_step=segment.denoiser.head.shard is not None)
        watch()


def prepare(segment: SegmentRun) -> KVCache:
    """Memory for the segment's keys and values, and no slot waiting."""
    slots = segment.progress.slot

    def allocate() -> Tensor:
        return torch.full_like(slots, len(segment.progress.start) - 1)

    workspace = segment.workspace
    waiting = allocate() if workspace is None else workspace.part(("waiting", len(slots)), allocate)
    return KVCache(keys_and_values(segment), waiting)


def keys_and_values(segment: SegmentRun) -> Tensor:
    """Memory for a segment's keys and values, of the shape `Denoiser.cache_shape`.

    With a workspace it belongs to the workspace, at the addresses that its graphs use, and is kept for later calls. For
    a DiT it is ``2 * blocks * B * (L + 1) * width`` numbers, shared by denoisers of one shape.
    """
    denoiser, slots = segment.denoiser, len(segment.progress.slot)
    shape = denoiser.cache_shape(
        slots * (2 if segment.settings.guidance_scale else 1), segment.state.input_ids.shape[1]
    )
    allocate = partial(torch.zeros, shape, dtype=denoiser.dtype, device=denoiser.device)
    if segment.workspace is None:
        return allocate()
    return segment.workspace.part(("keys and values", shape, denoiser.dtype), allocate)


def steps_of(segment: SegmentRun, kv_cache: KVCache, window: int | None) -> tuple[Graph | None, Callable[[], None]]:
    """A step, and its graph or None. A refresh (`window` None) is run once; the graph of another step is looped."""
    denoiser, progress, settings = segment.denoiser, segment.progress, segment.settings
    step = partial(
        cached_tick,
        denoiser,
        settings=settings,
        state=segment.state,
        progress=progress,
        model=segment.model,
        kv_cache=kv_cache,
        window=window,
    )
    graph = None
    if segment.workspace is not None:
        key = "cached", window, settings.key(), progress.key(), segment.model
        looped = None if window is None else progress.status
        graph = segment.workspace.graph(
            denoiser, key, step, progress.idle, loop_while=looped, rehearsed=settings.keeps_nothing
        )
    return graph, partial(step, denoiser.head)


def cached_tick(
    denoiser: Denoiser,
    head: Head,
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    model: int,
    kv_cache: KVCache,
    window: int | None,
) -> None:
    """`decode_slots` over `window` columns from the start of each slot's block, or over whole sequences for None.

    A slot whose block is finished then waits: it has no sequence, and `kv_cache.waiting` has the one to continue with.
    """
    before = progress.slot.clone()
    decode_slots(
        denoiser, head, settings, state, progress, model, partial(windows, cache=kv_cache.contents, window=window)
    )
    none = len(progress.start) - 1
    after = progress.slot
    over = (before != none) & ((after != before) | (progress.block_step[after] == 0))
    kv_cache.waiting.copy_(torch.where(over, after, kv_cache.waiting))
    progress.slot.copy_(torch.where(over, none, after))
    progress.count_slots()
    progress.tell()


def windows(
    denoiser: Denoiser,
    settings: Settings,
    state: SamplerState,
    progress: Progress,
    slots: Slots,
    cache: Tensor,
    window: int | None,
    offset: Tensor | None = None,
) -> Tensor:
    """Hidden states of the slots' blocks, ``[B, R, D]``, from a pass of the windows.

    `offset`, int64 ``[B]``, is the entry of its window at which each slot's block begins; None: 0.
    """
    ids, columns, positions, soft = slots.ids, None, slots.column, slots.column
    given = state.given[slots.sequence] if settings.guidance_scale else None
    if window is not None:
        length, device = ids.shape[1], ids.device
        columns = (slots.column[:, :1] + torch.arange(window, device=device)).clamp(max=length)
        inside = columns.clamp(max=length - 1)
        ids, given = ids.gather(1, inside), None if given is None else given.gather(1, inside)
        positions = torch.arange(slots.view.ids.shape[1], device=device).expand_as(slots.view.ids)
        soft = inside[:, : positions.shape[1]]
        if offset is not None:
            positions = offset[:, None] + positions
            soft = inside.gather(1, positions)
    return guided_hidden(
        Windowed(softened(denoiser, settings, progress, slots.sequence, soft), cache, columns),
        settings.guidance_scale,
        ids,
        given,
        progress.time(slots.sequence, slots.view.step) if denoiser.time_conditioning else None,
        positions,
        attended(state, slots),
    )


class Windowed(Denoiser):
    """A denoiser whose `hidden` runs windows of its sequences; with guidance, twice as many sequences."""

    def __init__(self, denoiser: Denoiser, cache: Tensor, columns: Tensor | None) -> None:
        self.denoiser, self.cache, self.columns = denoiser, cache, columns
        self.name, self.mask_id, self.head = denoiser.name, denoiser.mask_id, denoiser.head

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert positions is not None
        columns = self.columns
        if columns is not None:
            columns = columns.repeat(len(input_ids) // len(columns), 1)
        return self.denoiser.window_hidden(self.cache, input_ids, columns, positions, t, attention_mask)


def wait_all(progress: Progress, kv_cache: KVCache) -> None:
    """Make every slot wait with its sequence."""
    kv_cache.waiting.copy_(progress.slot)
    progress.idle()


def outlook(settings: Settings, progress: Progress, kv_cache: KVCache, length: int) -> Tensor:
    """int64 ``[2]``: number of slots that wait with a sequence, and the first column of their blocks."""
    assert settings.block_length is not None
    waits = kv_cache.waiting != len(progress.start) - 1
    first = progress.start[kv_cache.waiting] + progress.block[kv_cache.waiting] * settings.block_length
    return torch.stack((waits.sum(), torch.where(waits, first, length).min()))


def window_length(needed: int, block_length: int, length: int) -> int:
    """Length of a window that must hold `needed` columns: 1, 2, 3, 4, 6, 8, 12, ... blocks, so that graphs are few.

    At most a third of a window is unused. That part lies past the end of the sequences and does not change the result.
    """
    blocks = -(-needed // block_length)
    power = 1 << (blocks - 1).bit_length()
    rounded = power * 3 // 4 if power >= 4 and power * 3 // 4 >= blocks else power
    return min(rounded * block_length, length)
