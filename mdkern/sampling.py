"""`sample`: text from a heavy and a light denoiser under a schedule, running only the events of a reveal plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import ModelOutput

from mdkern.decoders import Decoder, Planned
from mdkern.engine import cached, planned, stepwise
from mdkern.engine.end_of_text import End, find_end
from mdkern.engine.graphs import lease
from mdkern.engine.hooks import Drafts
from mdkern.engine.request import Request
from mdkern.engine.resolve import resolve
from mdkern.engine.state import STOP_REASONS, Outcome, SamplerState, Timings
from mdkern.models import Denoiser
from mdkern.plan import GIVEN
from mdkern.schedule import Schedule

RUNS: dict[str, Callable[..., Outcome]] = {
    "none": stepwise.run,
    "prefix": partial(stepwise.run, decode=partial(cached.decode_stretch, dual=False)),
    "dual": partial(stepwise.run, decode=partial(cached.decode_stretch, dual=True)),
}  # of decoders that look at the model, by `cache`


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
        steps: int64 ``[N]``, steps until the last token was revealed, whether or not they needed a forward pass.
        stop_reason: of each sequence, ``"all_revealed"`` or ``"end_of_text"``.
        lengths: int64 ``[N]``, tokens of each text up to the first end of text that was written, without it: prompt
            included, padding not counted. All of the text where there is no end in it. An end of text in the prompt,
            or given between masks, is a token like others.
        prompt_lengths: int64 ``[N]``, tokens of each text before the first that was written, padding not counted.
        attention_mask: bool ``[N, L]``, False at padding; None: no padding.
        timings: seconds by what took them: ``plan``, one entry per denoiser name, ``total``.
        flops_saved: counted FLOPs saved by the schedule against the dearest denoiser running the same forward passes;
            None if a model does not tell its FLOPs, or passes are cut short by a cache.
        seed: the seed used.
        history: when `return_history` asked for it.
    """

    sequences: Tensor | None = None
    nfe: dict[str, Tensor] | None = None
    tokens_per_forward: Tensor | None = None
    steps: Tensor | None = None
    stop_reason: list[str] | None = None
    lengths: Tensor | None = None
    prompt_lengths: Tensor | None = None
    attention_mask: Tensor | None = None
    timings: dict[str, float] | None = None
    flops_saved: float | None = None
    seed: int | None = None
    history: History | None = None

    def decode(self, tokenizer: Any, *, skip_prompt: bool = False, **options: Any) -> list[str]:
        """The texts, each up to its end of text and without padding.

        Args:
            tokenizer: of transformers, or whatever has its ``decode(ids, **options)``.
            skip_prompt: leave out what is before the first token that was written.
            options: for the tokenizer.
        """
        assert self.sequences is not None
        assert self.lengths is not None
        assert self.prompt_lengths is not None
        attended = torch.ones_like(self.sequences, dtype=torch.bool)
        if self.attention_mask is not None:
            attended = self.attention_mask
        rows = zip(self.sequences.cpu(), attended.cpu(), self.prompt_lengths.tolist(), self.lengths.tolist())
        return [
            tokenizer.decode(row[kept][prompt if skip_prompt else 0 : length].tolist(), **options)
            for row, kept, prompt, length in rows
        ]


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
    guidance_scale: float = 0.0,
    logits_processor: Any = None,
    decoder: str | Decoder = "ancestral",
    block_length: int | None = None,
    cache: str = "none",
    stop_at_eos: bool = False,
    stopping_criteria: Any = None,
    streamer: Any = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    return_history: bool = False,
    cuda_graphs: bool = True,
    progress: bool | None = None,
) -> SampleOutput:
    """Sample from masked diffusion language models.

    By default the samples have the distribution of the step-by-step ancestral sampler (MD4, MDLM) with the
    schedule's denoiser at each step. Each is a function of the seed, its sample number and its prompt, whatever the
    batch; with `block_length` the longest sequence of the call says how many steps a block has.

    Args:
        heavy: a model that `mdkern.adapt` takes, or a mapping from names to such models; then the schedule may be the
            second argument.
        light: the model that the schedule calls ``L`` (`heavy` is ``H``). None: one model.
        schedule: a `Schedule` or its text, e.g. ``"L32 H192 L32"``.
        input_ids: int64 ``[N, L]``, the mask id wherever text is wanted. One row is repeated `num_samples` times.
        attention_mask: ``[N, L]`` of 0 and 1, 0 at padding, which is neither read nor written.
        num_samples: N, without `input_ids`. Default 1.
        length: L in tokens, without `input_ids`. Default: the model's longest.
        steps: T. Default: the schedule's own, or else L; with `block_length`, as many as its blocks have positions.
        batch_size: sequences per forward pass. Default 16. It changes speed and memory, not samples.
        temperature: of the tokens' distribution; 0 takes the most probable token.
        top_k, top_p, min_p: draw only among the `top_k` most probable ids, of these the fewest whose probabilities sum
            to `top_p`, of these the ones at least `min_p` times as probable as the first; 0, 1 and 0 are none.
        guidance_scale: w of classifier-free guidance: logits ``u + (w + 1) (c - u)``, u of the prompt masked too.
        logits_processor: a `LogitsProcessor` of transformers, or a list of them. It needs logits, which are then
            computed at the rows that want a token, some at a time; no CUDA graphs.
        decoder: a decoder of `mdkern.decoders` or its name: which positions are revealed at a step. Decoders that look
            at the model (top probability, threshold, ...) have no fixed number of passes; for those that reveal as much
            as they trust, the schedule's step is the share of the text that is revealed.
        block_length: reveal in blocks of so many positions from left to right, counted from a sequence's first masked
            position; positions compete inside the block only. Each block takes ``steps / blocks`` steps.
        cache: ``"prefix"`` or ``"dual"``: keep keys and values (Fast-dLLM, 2505.22618) from a full pass at the start of
            each block, or where another model takes over; the block's other passes run the block and what comes after
            it, or the block alone, in lock-step over the batch. Faster and approximate, as what is kept goes out of
            date with each token revealed; some tokens will differ from those of ``"none"``. For decoders that look at
            the model, with a `block_length`, and models that can (`Denoiser.takes_cache`). `nfe` counts both kinds of
            passes.
        stop_at_eos: end a text with the first of the model's ends of text (`Denoiser.eos_ids`) that is written: from
            there on there is only that. A sequence has no more passes once an end of text and all before it stay as
            they are, which a planned decoder looks for at the end of each block or, without blocks, at a sixteenth of
            the steps; a decoder that looks at the model after each step or, if it edits or remasks, each block.
            Whoever reads `SampleOutput.lengths`, or calls its `decode`, gets the text without its end.
        stopping_criteria: of transformers, given the ids ``[B, L]``, masks included, and None: ends a text before its
            first mask, and from there on there is only end of text. Asked after every step of a decoder that looks at
            the model, without CUDA graphs, and after every block of one that does not.
        streamer: of transformers: ``put`` with each finished sequence, in two parts, what it began with and the rest,
            then ``end``. If it has ``put_draft``, that is given all sequences ``[N, L]`` now and then.
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
    timings = Timings(time.perf_counter())
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
        guidance_scale=guidance_scale,
        logits_processor=logits_processor,
        decoder=decoder,
        block_length=block_length,
        cache=cache,
        stop_at_eos=stop_at_eos,
        stopping_criteria=stopping_criteria,
        streamer=streamer,
        seed=seed,
        generator=generator,
        sample_ids=sample_ids,
    )
    return run_request(request, timings, return_history, cuda_graphs, progress)


def run_request(
    request: Request, timings: Timings, return_history: bool, cuda_graphs: bool, progress: bool | None
) -> SampleOutput:
    """`sample` of arguments that are resolved."""
    run: Callable[..., Outcome] = planned.run if isinstance(request.decoder, Planned) else RUNS[request.cache]
    hooked = request.logits_processor is not None or (run is not planned.run and request.stopping_criteria is not None)
    on_gpu = request.device.type == "cuda"
    graphed = cuda_graphs and on_gpu and not hooked
    with (
        torch.cuda.device(request.device) if on_gpu else nullcontext(),  # kernels are launched on the current device
        torch.no_grad(),
        lease(request) if graphed else nullcontext() as workspace,
        tqdm(unit="pass", desc="denoising", disable=None if progress is None else not progress, leave=False) as bar,
    ):
        count, length = request.input_ids.shape
        if request.cache == "none":  # else passes are of windows, by `window_hidden`
            rows = min(request.batch_size, count) * length * (2 if request.guidance_scale else 1)
            prepared = {name: denoiser.prepared(rows) for name, denoiser in request.denoisers.items()}
            request = replace(request, denoisers=prepared)
        state = SamplerState.of(request) if workspace is None else workspace.state
        drafts = Drafts(request.streamer, state.input_ids[:count], state.given[:count], request.attention_mask)
        outcome = run(request, state, workspace, bar, drafts, timings)
        drafts.end()
        sequences = state.input_ids[:count].clone()
    return summarise(request, sequences, outcome, timings.total(), return_history)


def summarise(
    request: Request, sequences: Tensor, outcome: Outcome, timings: dict[str, float], return_history: bool
) -> SampleOutput:
    revealed = (outcome.model != GIVEN).sum(-1)  # what was filled with the end of text has a step and no model
    passes = sum(outcome.nfe.values(), torch.zeros_like(request.sample_ids))
    per_forward = revealed / passes
    history = History(outcome.step, outcome.model, tuple(request.denoisers), request.steps)
    saved = None
    if request.cache == "none":
        saved = counted_saving(request.denoisers, outcome.nfe, per_forward, sequences.shape[1])
    return SampleOutput(
        sequences=sequences,
        nfe=outcome.nfe,
        tokens_per_forward=per_forward,
        steps=(outcome.step.amax(-1) + 1).clamp(max=request.steps),
        stop_reason=[STOP_REASONS[reason] for reason in outcome.stop_reason.tolist()],
        lengths=tokens_before(find_end(sequences, request.masked, request.mask_id, request.eos_ids), request),
        prompt_lengths=tokens_before(find_end(request.input_ids, request.masked, request.mask_id, ()), request),
        attention_mask=request.attention_mask,
        timings=timings,
        flops_saved=saved,
        seed=request.seed,
        history=history if return_history else None,
    )


def tokens_before(end: End, request: Request) -> Tensor:
    """int64 ``[N]``: tokens of each text before its end, or all of them if it has none."""
    column = torch.arange(request.input_ids.shape[1], device=request.device)
    before = (column < end.column) | ~end.found
    return (before if request.attention_mask is None else before & request.attention_mask).sum(-1)


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
