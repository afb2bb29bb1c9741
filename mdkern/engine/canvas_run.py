"""Runs canvases one after another: the encoder, then the steps, eagerly or from captured graphs."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.engine import canvas_graphs
from mdkern.engine.canvas import CanvasSettings, CanvasState, canvas_step
from mdkern.engine.canvas_graphs import CapturedPasses, mask_tensors, masks_of, signature
from mdkern.engine.graphs import process_settings
from mdkern.models.hf.block_diffusion import BlockDiffusion

LENGTH_UNIT = 64  # prompts are padded to multiples of it on a GPU, so that captured passes serve many lengths
STEPS_AHEAD = 1  # steps that the host starts before it knows whether the canvas was finished before them

Draft = Callable[[Tensor], None]


class Texts(NamedTuple):
    """What is to be written to."""

    input_ids: Tensor  # int64 [B, L], the prompts
    attention_mask: Tensor  # bool [B, L]
    sample_ids: Tensor  # int64 [B]
    seed: int
    canvases: int  # at most
    end_ids: tuple[int, ...]
    pad_id: int | None
    inputs: Mapping[str, Any]  # what else the encoder is given with the prompts


class Written(NamedTuple):
    """What was written."""

    sequences: Tensor  # int64 [B, L + n * C]
    passes: Tensor  # int64 [B], of the decoder
    ended: Tensor  # bool [B], whether there is an end of text
    lengths: Tensor  # int64 [B], tokens before it, or all, padding not counted
    bad: Tensor  # int64 [B], the pass at which no token could be drawn; -1: none


@dataclass(eq=False)
class CanvasWorkspace:
    """The state, the cache and the passes captured over them, for one model, number of sequences and length."""

    network: BlockDiffusion
    process: Hashable  # settings of the process
    settings: CanvasSettings
    state: CanvasState
    cache: Any
    room: int
    passes: CapturedPasses


_kept: weakref.WeakKeyDictionary[Any, CanvasWorkspace] = weakref.WeakKeyDictionary()  # the last one of each model


def workspace_for(model: Any, settings: CanvasSettings, count: int, room: int) -> CanvasWorkspace:
    """The workspace of the last call with this model if it fits, else a new one."""
    found, process = _kept.pop(model, None), process_settings()
    known = found is not None and found.network.is_still(model)
    if (
        found is not None
        and known
        and found.settings == settings
        and found.state.canvas.shape[0] == count
        and found.room >= room
        and found.process == process
    ):
        return found
    network = found.network if found is not None and known else BlockDiffusion(model)
    del found  # gives its memory back before the new one is made
    room = -(-room // 64) * 64
    return CanvasWorkspace(
        network,
        process,
        settings,
        CanvasState.allocate(network, settings, count),
        network.new_cache(room),
        room,
        CapturedPasses(network.device),
    )


def write_texts(workspace: CanvasWorkspace, texts: Texts, cuda_graphs: bool, draft: Draft | None, put: Any) -> Written:
    """Write canvases until all texts have ended.

    Args:
        draft: called after each step with the most probable tokens ``[B, C]``.
        put: called after each canvas with its tokens ``[B, C]``.
    """
    network, state, cache = workspace.network, workspace.state, workspace.cache
    for layer in cache.layers:
        layer.place(0)
    ids, inputs, count = texts.input_ids, texts.inputs, len(texts.input_ids)
    own = texts.attention_mask.sum(-1)
    more = padded_length(texts, network.device) - ids.shape[1], 0
    fresh, whole = (torch.nn.functional.pad(tensor, more) for tensor in (ids, texts.attention_mask))
    attended = None if bool(whole.all()) else whole
    done = torch.zeros(count, dtype=torch.bool, device=ids.device)
    lengths = own + texts.canvases * network.canvas_length
    end_ids = torch.tensor(texts.end_ids, dtype=torch.int64, device=ids.device)
    state.begin_text(texts.seed)
    for number in range(texts.canvases):
        encode(workspace, fresh, attended, inputs, cuda_graphs)
        inputs = {}
        if attended is not None:
            attended = torch.nn.functional.pad(attended, (0, network.canvas_length), value=True)
        starts = own + number * network.canvas_length
        state.begin_canvas(texts.sample_ids, starts, cache.layers[0].filled, network.vocab_size, done)
        denoise(workspace, network.masks(count, attended, cache), cuda_graphs, draft)
        fresh, done, ended_at = finish_canvas(state.argmax, done | (state.bad >= 0), end_ids, texts.pad_id)
        lengths = torch.where((ended_at >= 0) & (lengths > starts + ended_at), starts + ended_at, lengths)
        ids = torch.cat((ids, fresh), dim=1)
        if put is not None:
            put(fresh)
        if number + 1 < texts.canvases and bool(done.all()):
            break
    lengths = lengths.clamp(max=ids.shape[1])
    ended = lengths < own + (ids.shape[1] - texts.input_ids.shape[1])
    return Written(ids, state.passes.clone(), ended, lengths, state.bad.clone())


def padded_length(texts: Texts, device: torch.device) -> int:
    """Columns of the prompts as the encoder is given them; images have places of their own."""
    unit = LENGTH_UNIT if canvas_graphs.can_capture(device) and not texts.inputs else 1
    return -(-texts.input_ids.shape[1] // unit) * unit


def finish_canvas(argmax: Tensor, done: Tensor, end_ids: Tensor, pad_id: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """A canvas's tokens, with padding after the first end of text and in texts that had ended before.

    Returns:
        the tokens ``[B, C]``, which texts have ended, and the place of the end of text in this canvas (-1: none).
    """
    is_end = torch.isin(argmax, end_ids) & ~done[:, None]
    before = is_end.cumsum(-1) - is_end.int()
    ended = is_end.any(-1)
    place = torch.where(ended, is_end.int().argmax(-1), -1)
    tokens = argmax
    if pad_id is not None:
        tokens = tokens.masked_fill((before > 0) | done[:, None], pad_id)
    return tokens.clone(), done | ended, place


def encode(
    workspace: CanvasWorkspace, ids: Tensor, attended: Tensor | None, inputs: Mapping[str, Any], cuda_graphs: bool
) -> None:
    """Run the encoder over new ids: captured at the second time that as many follow as many."""
    network, cache, passes = workspace.network, workspace.cache, workspace.passes
    masks = network.encoder_masks(ids, attended, cache, inputs)
    before, given = cache.layers[0].filled, {"ids": ids, **mask_tensors(masks)}
    captured = None
    if cuda_graphs and passes.possible and not inputs:
        key = "encoder", before, signature(given)
        captured = passes.find(key, given)
        if captured is None and passes.is_repeated(key):

            def run(own: Mapping[str, Tensor]) -> None:
                network.encode(own["ids"], masks_of(masks, own), cache, {})

            captured = passes.capture(key, given, run, "the encoder")
    if captured is None:
        for layer in cache.layers:
            layer.place(before)  # wherever a capture that failed may have left them
        network.encode(ids, masks, cache, inputs)
        return
    captured.graph.replay()
    for layer in cache.layers:
        layer.place(before + ids.shape[1])


def denoise(workspace: CanvasWorkspace, masks: Any, cuda_graphs: bool, draft: Draft | None) -> None:
    """All steps of a canvas: in one launch where the device can loop and nobody is shown drafts, else one by one."""
    network, state, settings, cache = workspace.network, workspace.state, workspace.settings, workspace.cache
    passes, left = workspace.passes, settings.max_denoising_steps
    given = mask_tensors(masks)

    def run(own: Mapping[str, Tensor]) -> None:
        canvas_step(network, state, settings, cache, masks_of(masks, own))

    step: Callable[[], None] = partial(run, given)
    if cuda_graphs and passes.possible:
        key = "step", cache.layers[0].filled, signature(given)
        if not passes.warm:
            passes.warm = True
            left -= 1
            if run_steps(step, state, 1, draft) or not left:
                return
        captured = passes.find(key, given) or passes.capture(key, given, run, "a step", loop_while=state.left)
        if captured is not None and captured.loop is not None and draft is None:
            captured.loop.run(lambda: None)
            return
        if captured is not None:
            step = captured.graph.replay
    run_steps(step, state, left, draft)


def run_steps(step: Callable[[], None], state: CanvasState, most: int, draft: Draft | None) -> bool:
    """Run up to `most` steps; whether the canvas is finished.

    On a GPU the host sees what a step gave while the next one runs, so that the device never waits. Drafts are those of
    the steps up to the one that finished the canvas.
    """
    on_gpu = state.left.is_cuda
    behind: deque[tuple[Tensor, Tensor | None, torch.cuda.Event | None]] = deque()
    for number in range(most):
        step()
        shown = None if draft is None else to_host(state.argmax)
        behind.append((to_host(state.left), shown, recorded() if on_gpu else None))
        while len(behind) > (STEPS_AHEAD if on_gpu and number + 1 < most else 0):
            left, shown, event = behind.popleft()
            if event is not None:
                event.synchronize()
            if draft is not None and shown is not None:
                draft(shown)
            if not int(left):
                return True
    return False


def to_host(tensor: Tensor) -> Tensor:
    """A copy for the host, there when an event that is recorded after it has passed."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def keep(model: Any, workspace: CanvasWorkspace) -> None:
    """Keep a workspace for the next call with this model."""
    _kept[model] = workspace


def clear() -> None:
    _kept.clear()
