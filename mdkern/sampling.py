"""`sample`: text from a heavy and a light denoiser under a schedule, running only the events of a reveal plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import ModelOutput

from mdkern.arguments import Filters, Request, resolve
from mdkern.decoders import Ancestral
from mdkern.graphs import Pacer, Workspace, lease
from mdkern.kernels import vocab_projection
from mdkern.kernels.tick import begin_tick, end_tick
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head
from mdkern.plan import GIVEN, RevealPlan, Ticks
from mdkern.schedule import Schedule
from mdkern.state import SamplerState, TickBuffer


@dataclass(frozen=True)
class History:
    """When and by which model each position was revealed."""

    step: Tensor  # int64 [N, L]: 0..T-1, T for the closing pass, -1 where the input gave the token
    model: Tensor  # int64 [N, L]: index into `models`, -1 where given
    models: tuple[str, ...]
    steps: int


@dataclass
class SampleOutput(ModelOutput):
    """What `sample` returns.

    Attributes:
        sequences: int64 ``[N, L]``, no masked position left.
        nfe: forward passes of each sequence by denoiser name, int64 ``[N]`` each.
        tokens_per_forward: float32 ``[N]``, tokens revealed per forward pass.
        timings: seconds by what took them: ``plan``, one entry per denoiser name, ``total``.
        flops_saved: counted FLOPs saved by the schedule against the dearest denoiser running the same forward passes;
            None if a model does not tell its FLOPs.
        seed: the seed used.
        history: when `return_history` asked for it.
    """

    sequences: Tensor | None = None
    nfe: dict[str, Tensor] | None = None
    tokens_per_forward: Tensor | None = None
    timings: dict[str, float] | None = None
    flops_saved: float | None = None
    seed: int | None = None
    history: History | None = None


def reveal_tick(
    denoiser: Denoiser, head: Head, filters: Filters, state: SamplerState, ticks: Ticks, batch: int, capacity: int
) -> None:
    """Run tick ``state.tick``: one forward pass of `batch` sequences, the head at `capacity` rows, tokens written.

    Everything is read from and written to device tensors; the host gives shapes only. `batch` and `capacity` must be
    at least the tick's own.
    """
    inputs = begin_tick(
        state.input_ids,
        state.attention_mask,
        state.text_position,
        state.sample,
        state.temperature,
        state.closing_step,
        ticks.sequence,
        ticks.step,
        ticks.time,
        ticks.position,
        ticks.row,
        ticks.row_count,
        state.tick,
        batch,
        capacity,
    )
    hidden = denoiser.hidden(
        inputs.input_ids,
        inputs.time if denoiser.time_conditioning else None,
        inputs.positions,
        inputs.attention_mask,
    )
    statistics = vocab_projection(
        hidden.flatten(0, 1),
        head.weight,
        head.bias,
        inputs.row,
        inputs.temperature,
        state.seed,
        inputs.keys,
        row_count=inputs.row_count,
        scale=head.scale,
        soft_cap=head.soft_cap,
        **filters._asdict(),
    )
    end_tick(state.input_ids, state.failed, state.tick, statistics.token, inputs.target, inputs.row_count)


def run_segment(
    denoiser: Denoiser, filters: Filters, state: SamplerState, ticks: Ticks, workspace: Workspace | None, bar: tqdm
) -> None:
    """All ticks of a segment: replayed where there is a workspace and the denoiser can be captured, else eagerly."""
    replays = None if workspace is None else captured_ticks(denoiser, filters, ticks, workspace)
    if replays is None:
        state.tick.zero_()
        for batch, rows in zip(ticks.batch, ticks.rows):
            reveal_tick(denoiser, denoiser.head, filters, state, ticks, batch, rows)
            bar.update(batch)
    else:
        buffer, graphs = replays
        pacer, start = Pacer(), 0
        while start < len(ticks):
            count = buffer.load(ticks, start)
            state.tick.zero_()
            for batch in ticks.batch[start : start + count]:
                graphs[batch].replay()
                pacer.replayed()
                bar.update(batch)
            start += count
    report_failure(denoiser, state)


def report_failure(denoiser: Denoiser, state: SamplerState) -> None:
    """The segment's one synchronisation."""
    if bool(state.failed):
        raise FloatingPointError(f"{denoiser.name} gave NaN or infinite logits, so no token could be drawn")


def captured_ticks(
    denoiser: Denoiser, filters: Filters, ticks: Ticks, workspace: Workspace
) -> tuple[TickBuffer, dict[int, torch.cuda.CUDAGraph]] | None:
    """The buffer that a segment's ticks are loaded into, and a graph for each batch size; None if not capturable."""
    slots, width, rows = ticks.sequence.shape[1], ticks.position.shape[2], ticks.row.shape[1]
    buffer = workspace.buffer(slots, width, rows)
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    for batch in sorted(set(ticks.batch)):
        step = partial(
            reveal_tick,
            denoiser,
            filters=filters,
            state=workspace.state,
            ticks=buffer.ticks,
            batch=batch,
            capacity=rows,
        )

        def idle() -> None:
            buffer.idle()
            workspace.state.tick.zero_()

        graph = workspace.graph(denoiser, ("reveal", slots, width, rows, batch, filters), step, idle)
        if graph is None:
            return None
        graphs[batch] = graph.captured
    return buffer, graphs


def sample(
    heavy: Any,
    light: Any = None,
    schedule: str | Schedule | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_samples: int | None = None,
    length: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    decoder: str | Ancestral = "ancestral",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    return_history: bool = False,
    cuda_graphs: bool = True,
    progress: bool | None = None,
) -> SampleOutput:
    """Sample from masked diffusion language models.

    The samples have the distribution of the step-by-step ancestral sampler (MD4, MDLM) with the schedule's denoiser at
    each step; each is a function of the seed, its sample number and its prompt, whatever the batch.

    Args:
        heavy: a model that `mdkern.adapt` takes, or a mapping from names to such models; then the schedule may be the
            second argument.
        light: the model that the schedule calls ``L`` (`heavy` is ``H``). None: one model.
        schedule: a `Schedule` or its text, e.g. ``"L32 H192 L32"``.
        input_ids: int64 ``[N, L]``, the mask id wherever text is wanted. One row is repeated `num_samples` times.
        attention_mask: ``[N, L]`` of 0 and 1, 0 at padding, which is neither read nor written.
        num_samples: N, without `input_ids`. Default 1.
        length: L in tokens, without `input_ids`. Default: the model's longest.
        steps: T. Default: the schedule's own, or else L.
        batch_size: sequences per forward pass. Default 16. It changes speed and memory, not samples.
        temperature: of the tokens' distribution; 0 takes the most probable token.
        top_k, top_p, min_p: draw only among the `top_k` most probable ids, of these the fewest whose probabilities sum
            to `top_p`, of these the ones at least `min_p` times as probable as the first; 0, 1 and 0 are none.
        decoder: a decoder or its name.
        seed: 64-bit. None takes one from `generator`, or from PyTorch's default generator.
        generator: source of the seed when none is given.
        sample_ids: the N sample numbers that key the randomness. Default 0..N-1.
        return_history: whether to return when and by whom each position was revealed.
        cuda_graphs: on a GPU, capture each denoiser's step once and replay it; a model that can't be captured runs
            eagerly, with a warning. Captured graphs are kept for later calls (`mdkern.graphs`). False: run eagerly, as
            a model must whose forward has effects in Python. The samples are the same.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        `SampleOutput`.

    Raises:
        ValueError, TypeError: an argument that cannot be right, before any forward pass.
        FloatingPointError: NaN or infinite logits.
    """
    began = time.perf_counter()
    request = resolve(
        heavy,
        light,
        schedule,
        input_ids=input_ids,
        attention_mask=attention_mask,
        num_samples=num_samples,
        length=length,
        steps=steps,
        batch_size=batch_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        decoder=decoder,
        seed=seed,
        generator=generator,
        sample_ids=sample_ids,
    )
    graphed = cuda_graphs and request.device.type == "cuda"
    with torch.no_grad(), lease(request) if graphed else nullcontext() as workspace:
        state = SamplerState.of(request) if workspace is None else workspace.state
        plan = draw_plan(request, state)
        timings = {"plan": time.perf_counter() - began} | dict.fromkeys(request.denoisers, 0.0)
        times = request.decoder.times(request.steps).to(request.device, torch.float32)
        total = int(plan.events().sum())
        hidden_bar = None if progress is None else not progress
        with tqdm(total=total, unit="pass", desc="denoising", disable=hidden_bar, leave=False) as bar:
            for model, first, stop in segments_with_closing(request):
                segment_began = time.perf_counter()
                ticks = plan.ticks(first, stop, request.batch_size, times, bucket if graphed else int)
                if ticks is not None:
                    run_segment(request.denoisers[model], request.filters, state, ticks, workspace, bar)
                timings[model] += time.perf_counter() - segment_began
        sequences = state.input_ids[: len(request.input_ids)].clone()
    timings["total"] = time.perf_counter() - began
    return summarise(request, sequences, plan, timings, return_history)


def bucket(size: int) -> int:
    """The power of two at or above, at least 4: graphs are captured for few shapes."""
    return 1 << max(2, (size - 1).bit_length())


def draw_plan(request: Request, state: SamplerState) -> RevealPlan:
    masked = request.input_ids == request.mask_id
    if request.attention_mask is not None:
        masked &= request.attention_mask
    alpha = request.decoder.alpha(request.decoder.times(request.steps)).to(request.device)
    count = len(masked)
    return RevealPlan.draw(masked, alpha, state.seed, state.sample[:count], state.text_position[:count])


def segments_with_closing(request: Request) -> list[tuple[str, int, int]]:
    """(denoiser, first, stop) of each segment; the closing pass, step T, goes to the last one."""
    *others, last = [(segment.model, segment.first, segment.stop) for segment in request.segments]
    return [*others, (last[0], last[1], last[2] + 1)]


def summarise(
    request: Request, sequences: Tensor, plan: RevealPlan, timings: dict[str, float], return_history: bool
) -> SampleOutput:
    segments = segments_with_closing(request)
    nfe = {name: torch.zeros_like(request.sample_ids) for name in request.denoisers}
    model = torch.full_like(plan.step, GIVEN)
    names = tuple(request.denoisers)
    for name, first, stop in segments:
        nfe[name] += plan.events(first, stop)
        model[(plan.step >= first) & (plan.step < stop)] = names.index(name)
    revealed, passes = (plan.step >= 0).sum(-1), sum(nfe.values(), torch.zeros_like(request.sample_ids))
    return SampleOutput(
        sequences=sequences,
        nfe=nfe,
        tokens_per_forward=revealed / passes,
        timings=timings,
        flops_saved=counted_saving(request.denoisers, nfe, revealed / passes, plan.step.shape[1]),
        seed=request.seed,
        history=History(plan.step, model, names, request.steps) if return_history else None,
    )


def counted_saving(
    denoisers: Mapping[str, Denoiser], nfe: Mapping[str, Tensor], tokens_per_forward: Tensor, length: int
) -> float | None:
    """Share of the FLOPs that the dearest denoiser would have spent on the same forward passes."""
    rows = max(1, round(float(tokens_per_forward.mean())))
    cost = {name: denoiser.flops(length, rows) for name, denoiser in denoisers.items()}
    known = {name: flops for name, flops in cost.items() if flops is not None}
    if len(known) < len(cost):
        return None
    passes = {name: int(count.sum()) for name, count in nfe.items()}
    return 1.0 - sum(passes[name] * known[name] for name in known) / (max(known.values()) * sum(passes.values()))
