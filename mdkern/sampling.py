"""`sample`: text from a heavy and a light denoiser under a schedule, running only the events of a reveal plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import ModelOutput

from mdkern.arguments import Request, resolve
from mdkern.decoders import Ancestral
from mdkern.kernels import vocab_projection
from mdkern.models import Denoiser
from mdkern.plan import GIVEN, RevealPlan, Ticks, positions_in_text
from mdkern.schedule import Schedule


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


@dataclass
class SamplerState:
    """All that crosses a tick, on the device. Row N of the tensors over sequences is scratch for unused slots."""

    input_ids: Tensor  # int64 [N + 1, L]
    attention_mask: Tensor | None  # bool [N + 1, L]
    text_position: Tensor  # int64 [N + 1, L], keys the noise
    sample: Tensor  # int64 [N + 1], keys the noise
    times: Tensor  # float32 [T + 1]
    temperature: Tensor  # float32 []
    seed: Tensor  # int64 []
    tick: Tensor  # int64 [1]
    failed: Tensor  # bool [], whether a row had NaN logits

    @staticmethod
    def start(request: Request) -> SamplerState:
        device = request.device

        def with_scratch(x: Tensor) -> Tensor:
            return torch.cat((x, x[:1]))

        mask = request.attention_mask
        if mask is None:
            text_position = torch.arange(request.input_ids.shape[1], device=device).expand_as(request.input_ids)
        else:
            text_position = positions_in_text(mask)
        return SamplerState(
            input_ids=with_scratch(request.input_ids),
            attention_mask=None if mask is None else with_scratch(mask),
            text_position=with_scratch(text_position),
            sample=with_scratch(request.sample_ids),
            times=request.decoder.times(request.steps).to(device, torch.float32),
            temperature=torch.tensor(request.temperature, device=device),
            seed=torch.tensor(request.seed, device=device),
            tick=torch.zeros(1, dtype=torch.int64, device=device),
            failed=torch.zeros((), dtype=torch.bool, device=device),
        )


def reveal_tick(denoiser: Denoiser, state: SamplerState, ticks: Ticks, batch: int, capacity: int) -> None:
    """Run tick ``state.tick``: one forward pass of `batch` sequences, the head at `capacity` rows, tokens written.

    Everything is read from and written to device tensors; the host gives shapes only. `batch` and `capacity` must be
    at least the tick's own.
    """

    def of_tick(x: Tensor) -> Tensor:
        return x.index_select(0, state.tick)[0]

    sequence, step = of_tick(ticks.sequence)[:batch], of_tick(ticks.step)[:batch]  # [B]
    position = of_tick(ticks.position)[:batch]  # [B, R]
    row, row_count = of_tick(ticks.row)[:capacity], of_tick(ticks.row_count)  # [M], []
    hidden = denoiser.hidden(
        state.input_ids[sequence],
        state.times[step] if denoiser.time_conditioning else None,
        position,
        None if state.attention_mask is None else state.attention_mask[sequence],
    )
    slot = row // position.shape[1]
    row_sequence, row_step, row_position = sequence[slot], step[slot], position.reshape(-1)[row]  # [M]
    keys = torch.stack((state.sample[row_sequence], state.text_position[row_sequence, row_position], row_step), dim=-1)
    closing = row_step == state.times.shape[0] - 1
    head = denoiser.head
    statistics = vocab_projection(
        hidden.flatten(0, 1),
        head.weight,
        head.bias,
        row,
        torch.where(closing, 0.0, state.temperature),
        state.seed,
        keys,
        row_count=row_count,
        scale=head.scale,
        soft_cap=head.soft_cap,
    )
    used = torch.arange(capacity, device=row.device) < row_count
    state.failed |= ((statistics.token < 0) & used).any()
    scratch = state.input_ids.shape[0] - 1
    state.input_ids[torch.where(used, row_sequence, scratch), row_position] = statistics.token.clamp(min=0)
    state.tick += 1


def run_segment(denoiser: Denoiser, state: SamplerState, ticks: Ticks, progress: tqdm) -> None:
    """All ticks of a segment, run eagerly."""
    state.tick.zero_()
    for batch, rows in zip(ticks.batch, ticks.rows):
        reveal_tick(denoiser, state, ticks, batch, rows)
        progress.update(batch)
    if bool(state.failed):  # the segment's one synchronisation
        raise FloatingPointError(f"{denoiser.name} gave NaN or infinite logits, so no token could be drawn")


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
    decoder: str | Ancestral = "ancestral",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    return_history: bool = False,
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
        decoder: a decoder or its name.
        seed: 64-bit. None takes one from `generator`, or from PyTorch's default generator.
        generator: source of the seed when none is given.
        sample_ids: the N sample numbers that key the randomness. Default 0..N-1.
        return_history: whether to return when and by whom each position was revealed.
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
        decoder=decoder,
        seed=seed,
        generator=generator,
        sample_ids=sample_ids,
    )
    with torch.no_grad():
        state = SamplerState.start(request)
        plan = draw_plan(request, state)
        timings = {"plan": time.perf_counter() - began} | dict.fromkeys(request.denoisers, 0.0)
        total = int(plan.events().sum())
        hidden_bar = None if progress is None else not progress
        with tqdm(total=total, unit="pass", desc="denoising", disable=hidden_bar, leave=False) as bar:
            for model, first, stop in segments_with_closing(request):
                segment_began = time.perf_counter()
                ticks = plan.ticks(first, stop, request.batch_size)
                if ticks is not None:
                    run_segment(request.denoisers[model], state, ticks, bar)
                timings[model] += time.perf_counter() - segment_began
    timings["total"] = time.perf_counter() - began
    return summarise(request, state, plan, timings, return_history)


def draw_plan(request: Request, state: SamplerState) -> RevealPlan:
    masked = request.input_ids == request.mask_id
    if request.attention_mask is not None:
        masked &= request.attention_mask
    alpha = request.decoder.alpha(request.decoder.times(request.steps)).to(request.device)
    return RevealPlan.draw(masked, alpha, state.seed, state.sample[:-1], state.text_position[:-1])


def segments_with_closing(request: Request) -> list[tuple[str, int, int]]:
    """(denoiser, first, stop) of each segment; the closing pass, step T, goes to the last one."""
    *others, last = [(segment.model, segment.first, segment.stop) for segment in request.segments]
    return [*others, (last[0], last[1], last[2] + 1)]


def summarise(
    request: Request, state: SamplerState, plan: RevealPlan, timings: dict[str, float], return_history: bool
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
        sequences=state.input_ids[:-1],
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
