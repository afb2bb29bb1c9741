"""`sample`: text from a heavy and a light denoiser under a schedule, running only the events of a reveal plan."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders import Decoder
from mdkern.engine.checks import check_count
from mdkern.engine.groups import Groups
from mdkern.engine.resolve import resolve
from mdkern.output import SampleOutput
from mdkern.schedule import Schedule


def sample(
    heavy: Any,
    light: Any = None,
    schedule: str | Schedule | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    num_samples: int | None = None,
    length: int | None = None,
    steps: int | None = None,
    steps_per_block: int | None = None,
    batch_size: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    top_p_rule: str = "reach",
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
    batch: also its number of steps, and where the schedule's models take turns in them.

    Args:
        heavy: a model that `mdkern.adapt` takes, or a mapping from names to such models.
        light: the model that the schedule calls ``L`` (`heavy` is ``H``). None: one model. Without it the schedule may
            be the second argument.
        schedule: a `Schedule` or its text, e.g. ``"L32 H192 L32"``.
        input_ids: int64 ``[N, L]``, the mask id wherever text is wanted. One row is repeated `num_samples` times.
        attention_mask: ``[N, L]`` of 0 and 1, 0 at padding, which is neither read nor written.
        token_type_ids: what tokenizers add to the two; all 0.
        num_samples: N, without `input_ids`. Default 1.
        length: L in tokens, without `input_ids`. Default: the model's longest.
        steps: T. Default: the schedule's own, or else as many as the sequence has tokens, padding not counted; with
            `block_length`, as many as its blocks have positions. Then each sequence has its own T, to which a schedule
            of shares is fitted.
        steps_per_block: instead of `steps`, with `block_length`: T is so many for each block of the sequence.
        batch_size: sequences per forward pass. Default 16. It changes speed and memory, not samples.
        temperature: of the tokens' distribution; 0 takes the most probable token.
        top_k, top_p, min_p: draw only among the `top_k` most probable ids, of these the fewest whose probabilities sum
            to `top_p`, of these the ones at least `min_p` times as probable as the first. None is none. Of ids that
            are equally probable `top_k` and `top_p` keep the lowest.
        top_p_rule: ``"reach"``: the fewest ids that sum to at least `top_p`. ``"within"``: the most that sum to at most
            `top_p`, as in the code of ReMDM and BD3-LM: for their published values.
        guidance_scale: w of classifier-free guidance: logits ``u + (w + 1) (c - u)``, u of the prompt masked too.
        logits_processor: a logits processor, or a list of them: of transformers those that need no order of writing
            (`mdkern.engine.processors` says which; others are refused), or callables ``(input_ids, scores) -> scores``
            or ``(input_ids, scores, positions) -> scores``. They need logits, which are then computed at the rows that
            want a token, some at a time; no CUDA graphs.
        decoder: a decoder of `mdkern.decoders` or its name: which positions are revealed at a step. Decoders that look
            at the model (top probability, threshold, ...) have no fixed number of passes; for those that reveal as much
            as they trust, the schedule's step is the share of the text that is revealed.
        block_length: reveal in blocks of so many positions from left to right, counted from a sequence's first masked
            position; positions compete inside the block only. Each block takes ``steps / blocks`` steps, of its
            sequence's own number of blocks, which must divide `steps`.
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
        stopping_criteria: a stopping criterion, or a list of them; a text that one ends is filled up like one that
            ended by `stop_at_eos`. Those of transformers see the text before the first mask (`mdkern.engine.criteria`);
            other callables the ids ``[B, L]``, masks included, and None. Asked after every step of a decoder that looks
            at the model, without CUDA graphs, and after every block of one that does not.
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
        FloatingPointError: no token could be drawn for some samples, since logits were NaN, infinite or all forbidden:
            which samples, at which step, and whether the model or a logits processor is the reason. The other samples
            are finished first.
        Otherwise what models and hooks raise. ``partial`` of any exception of the run, KeyboardInterrupt among them, is
        a `SampleOutput` of the samples that were finished; its ``sample_ids`` say which.
    """
    began = time.perf_counter()
    request = resolve(
        heavy,
        light,
        schedule,
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_type_ids,
        num_samples=num_samples,
        length=length,
        steps=steps,
        steps_per_block=steps_per_block,
        batch_size=batch_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        top_p_rule=top_p_rule,
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
    return Groups(request, None, return_history, cuda_graphs, progress, began).all()


def sample_groups(
    heavy: Any,
    light: Any = None,
    schedule: str | Schedule | None = None,
    *,
    group_size: int | None = None,
    return_history: bool = False,
    cuda_graphs: bool = True,
    progress: bool | None = None,
    **arguments: Any,
) -> Iterator[SampleOutput]:
    """`sample`, its samples handed over group by group as they finish: together the same as `sample` returns.

    All arguments are checked at once; what is not asked for any more is not run. The models must not be changed
    in the meantime.

    Args:
        heavy, light, schedule, return_history, cuda_graphs, progress, arguments: as in `sample`.
        group_size: consecutive samples of a group; they go through the schedule together. None: as few batches as take
            hardly more passes than all samples at once would.

    Yields:
        A `SampleOutput` of each group. Its ``sample_ids`` say which samples it has: all of the group but those for
        which no token could be drawn.

    Raises:
        As `sample` does, what models and hooks raise while it is iterated over. A FloatingPointError comes when all
        other samples are finished. ``partial`` of an exception has what is finished and was not yet handed over.
    """
    began = time.perf_counter()
    size = None if group_size is None else check_count("group_size", group_size)
    request = resolve(heavy, light, schedule, **arguments)
    return iter(Groups(request, size, return_history, cuda_graphs, progress, began))
