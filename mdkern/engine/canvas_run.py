"""Runs canvases one after another: the encoder, then the steps, eagerly or from a captured graph."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.engine.canvas import CanvasSettings, CanvasState, canvas_step
from mdkern.engine.graphs import CaptureError, capture
from mdkern.models.hf.block_diffusion import BlockDiffusion

MOST_GRAPHS = 16  # of a workspace: one for each length of what is before the canvas
STEPS_AHEAD = 1  # steps that the host may start before it knows whether the canvas was finished before them

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
    """The state, the cache and the graphs over them, for one model, number of sequences and length."""

    network: BlockDiffusion | None  # None between calls, as it holds the model
    marks: Hashable  # of the network
    settings: CanvasSettings
    state: CanvasState
    cache: Any
    room: int
    graphs: OrderedDict[int, torch.cuda.CUDAGraph] = field(default_factory=OrderedDict)
    pool: Any = None
    refused: bool = False  # a step could not be captured


_kept: weakref.WeakKeyDictionary[Any, CanvasWorkspace] = weakref.WeakKeyDictionary()  # the last one of each model


def workspace_for(model: Any, settings: CanvasSettings, count: int, room: int) -> CanvasWorkspace:
    """The workspace of the last call with this model if it fits, else a new one."""
    found = _kept.pop(model, None)
    network = BlockDiffusion(model)
    if (
        found is not None
        and found.settings == settings
        and found.state.canvas.shape[0] == count
        and found.room >= room
        and found.marks == network.marks()
    ):
        found.network = network
        return found
    del found  # gives its memory back before the new one is made
    room = -(-room // 64) * 64
    return CanvasWorkspace(
        network,
        network.marks(),
        settings,
        CanvasState.allocate(network, settings, count),
        network.new_cache(room),
        room,
    )


def write_texts(workspace: CanvasWorkspace, texts: Texts, cuda_graphs: bool, draft: Draft | None, put: Any) -> Written:
    """Write canvases until all texts have ended.

    Args:
        draft: called after each step with the most probable tokens ``[B, C]``.
        put: called after each canvas with its tokens ``[B, C]``.
    """
    network, state, cache = workspace.network, workspace.state, workspace.cache
    assert network is not None
    for layer in cache.layers:
        layer.rewind()
    ids, attended, inputs = texts.input_ids, texts.attention_mask, texts.inputs
    own = attended.sum(-1)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    lengths = own + texts.canvases * network.canvas_length
    end_ids = torch.tensor(texts.end_ids, dtype=torch.int64, device=ids.device)
    state.begin_text(texts.seed)
    fresh = ids
    for number in range(texts.canvases):
        network.encode(fresh, attended, cache, inputs)
        inputs = {}
        attended = torch.nn.functional.pad(attended, (0, network.canvas_length), value=True)
        starts = own + number * network.canvas_length
        state.begin_canvas(texts.sample_ids, starts, ids.shape[1], network.vocab_size, done)
        denoise(workspace, network.masks(attended, cache), cuda_graphs, draft)
        fresh, done, ended_at = finish_canvas(state.argmax, done | (state.bad >= 0), end_ids, texts.pad_id)
        lengths = torch.where((ended_at >= 0) & (lengths > starts + ended_at), starts + ended_at, lengths)
        ids = torch.cat((ids, fresh), dim=1)
        if put is not None:
            put(fresh)
        if bool(done.all()):
            break
    lengths = lengths.clamp(max=ids.shape[1])
    ended = lengths < own + (ids.shape[1] - texts.input_ids.shape[1])
    return Written(ids, state.passes.clone(), ended, lengths, state.bad.clone())


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


def denoise(workspace: CanvasWorkspace, masks: Any, cuda_graphs: bool, draft: Draft | None) -> None:
    """All steps of a canvas. The host learns one step late that it is finished, so that the device never waits."""
    network, state, settings, cache = workspace.network, workspace.state, workspace.settings, workspace.cache
    assert network is not None
    on_gpu = network.device.type == "cuda"

    def step() -> None:
        canvas_step(network, state, settings, cache, masks)

    graph: torch.cuda.CUDAGraph | None = None
    flags: list[tuple[Tensor, torch.cuda.Event]] = []
    for number in range(settings.max_denoising_steps):
        if on_gpu and cuda_graphs and not workspace.refused and graph is None:
            graph = graph_for(workspace, step, masks, warm=number > 0)
        if graph is None:
            step()
        else:
            graph.replay()
        if draft is not None:
            draft(state.argmax)
        if not on_gpu:
            if bool(state.over):
                break
            continue
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(state.over, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        flags.append((flag, event))
        if len(flags) > STEPS_AHEAD:
            known, event = flags.pop(0)
            event.synchronize()
            if bool(known):
                break


def graph_for(workspace: CanvasWorkspace, step: Callable[[], None], masks: Any, warm: bool) -> Any:
    """The graph of a step at this length; None until a step of it has run, which serves as its warm-up.

    Padding changes from call to call, so with masks a graph serves one canvas.
    """
    plain = all(mask is None for mask in masks.values())
    key: int = workspace.cache.layers[0].filled
    graph = workspace.graphs.pop(key, None) if plain else None
    if graph is None:
        if not warm:
            return None
        if not workspace.graphs:
            workspace.pool = torch.cuda.graph_pool_handle()
        try:
            graph, _ = capture(step, lambda: None, workspace.pool, workspace.state.canvas.device, warm_ups=0)
        except CaptureError as error:
            workspace.refused = True
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            warnings.warn(f"a step can't be captured in a CUDA graph and runs eagerly, slower: {reason}", stacklevel=6)
            return None
    if plain:
        workspace.graphs[key] = graph
        while len(workspace.graphs) > MOST_GRAPHS:
            workspace.graphs.popitem(last=False)
    return graph


def keep(model: Any, workspace: CanvasWorkspace) -> None:
    """Keep a workspace for the next call with this model."""
    workspace.network = None
    _kept[model] = workspace


def clear() -> None:
    _kept.clear()
