"""`sample` and `sample_groups`: text from a heavy and a light denoiser under a schedule."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mdkern.agreed import resolve_agreed
from mdkern.decoders import Decoder
from mdkern.engine.checks import check_count
from mdkern.engine.groups import Groups
from mdkern.models.hf.kinds import is_block_diffusion
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
    batch_invariant: bool = False,
    return_history: bool = False,
    cuda_graphs: bool = True,
    progress: bool | None = None,
) -> SampleOutput:
    """Sample from masked diffusion language models.

    By default the samples have the distribution of the step-by-step ancestral sampler (MD4, MDLM) with the
    schedule's denoiser at each step. Each sample depends only on the seed, its sample number and its prompt, and not on
    the rest of the batch; so do its number of steps and the steps at which the models change.

    Args:
        heavy: a model that `mdkern.adapt` takes, or a mapping from names to such models. A
            ``DiffusionGemmaForBlockDiffusion`` is sampled as by `mdkern.sample_canvas`, which has its own arguments.
        light: the model that the schedule calls ``L`` (`heavy` is ``H``). None: only one model. The schedule may then
            be the second argument.
        schedule: a `Schedule` or its text, e.g. ``"L32 H192 L32"``; or a `Router`, which chooses the model of each
            sequence's next pass from what the last one showed, for a decoder that looks at the model.
        input_ids: int64 ``[N, L]``, the mask id wherever text is wanted. One row is repeated `num_samples` times.
        attention_mask: ``[N, L]`` of 0 and 1, 0 at padding, which is neither read nor written.
        token_type_ids: accepted because some tokenizers return them; must be all 0.
        num_samples: N, without `input_ids`. Default 1.
        length: L in tokens, without `input_ids`. Default: the model's longest.
        steps: T. Default: the schedule's number of steps, or else the number of the sequence's tokens, padding not
            counted; with `block_length`, the number of positions of its blocks. Each sequence then has its own T, to
            which a schedule of shares is fitted.
        steps_per_block: the number of steps of each block, instead of `steps`, with `block_length`.
        batch_size: sequences per forward pass. Default 16. It changes speed and memory, not samples.
        temperature: of the tokens' distribution; 0 takes the most probable token.
        top_k, top_p, min_p: draw only from the `top_k` most probable ids; of these from the fewest whose probabilities
            sum to `top_p`; of these from the ones that are at least `min_p` times as probable as the most probable.
            None leaves a filter out. Of equally probable ids `top_k` and `top_p` keep the lowest.
        top_p_rule: ``"reach"``: the fewest ids that sum to at least `top_p`. ``"within"``: the most that sum to at most
            `top_p`, as in the code of ReMDM and BD3-LM, whose published values of `top_p` are meant so.
        guidance_scale: w of classifier-free guidance, with logits ``u + (w + 1) (c - u)``, where u are those of the
            sequence with the prompt masked as well.
        logits_processor: a logits processor, or a list of them. Of those of transformers, the ones that need no order
            of writing are taken, as `mdkern.engine.processors` lists, and others are refused. Any callable
            ``(input_ids, scores) -> scores`` or ``(input_ids, scores, positions) -> scores`` is taken, too. They need
            logits, which are computed for the rows that want a token, some at a time, without CUDA graphs.
        decoder: a decoder of `mdkern.decoders`, or its name: which positions are revealed at a step. Decoders that look
            at the model (top probability, threshold, ...) have no fixed number of passes. For those that determine the
            number of steps themselves, the schedule's step is the share of the text that is revealed.
        block_length: reveal in blocks of so many positions from left to right, counted from a sequence's first masked
            position. Positions compete within a block only. Each block takes ``steps / blocks`` steps, where a
            sequence's number of blocks must divide `steps`. A block-causal model is always sampled in its own blocks,
            which are counted from the text's first token.
        cache: ``"prefix"`` or ``"dual"``: store keys and values (Fast-dLLM, 2505.22618) in a full pass at the start of
            each block and when the model changes. The other passes run the block and everything after it, or the block
            alone. This is faster and approximate, because the stored keys and values are out of date as soon as a token
            is revealed; some tokens will differ from those of ``"none"``. It needs a `block_length`. ``"block"``, for
            block-causal models, is exact: each block is run once more when it is finished, and so are those of the
            prompt, and then never again. All need a decoder that looks at the model, and models that support it
            (`Denoiser.takes_cache`). `nfe` counts all passes.
        stop_at_eos: end a text with the first end of text (`Denoiser.eos_ids`) that is written, and fill the rest with
            end of text. A sequence has no more passes once its end of text and all tokens before it are final. Planned
            decoders check this at the end of each block or, without blocks, 16 times in a run; others after each step
            or, if they edit or remask, each block. `SampleOutput.lengths` and `decode` give the text without its end.
        stopping_criteria: a stopping criterion, or a list of them. A text that one ends is filled up as with
            `stop_at_eos`. Those of transformers are given the text before the first mask (`mdkern.engine.criteria`);
            other callables are given the ids ``[B, L]``, masks included, and None. They are called after every step of
            a decoder that looks at the model, without CUDA graphs, and after every block of one that does not.
        streamer: as for transformers' ``generate``: ``put`` is called twice for each finished sequence, with the prompt
            and with the rest, then ``end``. If it has ``put_draft``, that is given all sequences ``[N, L]`` now and
            then.
        seed: 64-bit number. None takes one from `generator`, or from PyTorch's default generator.
        generator: source of the seed when none is given.
        sample_ids: the N sample numbers that key the randomness. Default 0..N-1.
        batch_invariant: on a GPU, compute every sequence with the same bits whatever is computed with it: whatever the
            batch size, the order, the other sequences, and the padding after the text. Otherwise rounding in the last
            bits may differ and, rarely, change a token. It needs padding after the text, if any, and models that run by
            mdkern's own passes.
        return_history: return when, and by which model, each position was revealed.
        cuda_graphs: on a GPU, capture each denoiser's step once and replay it. A model that can't be captured runs
            eagerly, with a warning. Graphs are kept for later calls (`mdkern.graphs`). False runs eagerly, which is
            needed for a model whose forward has side effects in Python. The samples are the same.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        `SampleOutput`.

    Raises:
        ValueError, TypeError: an argument that cannot be right, before any forward pass.
        FloatingPointError: no token could be drawn for some samples, because logits were NaN, infinite or all
            forbidden. The message names the sample and the step, and whether the model or a logits processor is the
            cause. The other samples are finished first.
        Any exception of a model or hook. ``partial`` of any exception during the run, KeyboardInterrupt included, is a
        `SampleOutput` of the samples that were finished; its ``sample_ids`` say which.
    """
    if is_block_diffusion(heavy):
        given = {name: value for name, value in locals().items() if name != "heavy"}
        from mdkern.canvas import of_sample  # imports transformers, which takes a second

        return of_sample(heavy, given, {name: own.default for name, own in signature(sample).parameters.items()})
    began = time.perf_counter()
    request = resolve_agreed(
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
        batch_invariant=batch_invariant,
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
    """Like `sample`, but yields the samples group by group as they finish. Together they are the samples of `sample`.

    All arguments are checked at once. If the iteration is stopped, the remaining groups are not run. The models must
    not be changed during it.

    Args:
        heavy, light, schedule, return_history, cuda_graphs, progress, arguments: as in `sample`.
        group_size: number of consecutive samples in a group. They go through the schedule together. None: the smallest
            size with which all groups take hardly more passes than one run of all samples.

    Yields:
        A `SampleOutput` for each group. Its ``sample_ids`` say which samples it has: all of the group except those for
        which no token could be drawn.

    Raises:
        What `sample` raises; exceptions of models and hooks during the iteration. A FloatingPointError is raised after
        all other samples are finished. ``partial`` of an exception has what was finished and not yet yielded.
    """
    began = time.perf_counter()
    size = None if group_size is None else check_count("group_size", group_size)
    request = resolve_agreed(heavy, light, schedule, **arguments)
    return iter(Groups(request, size, return_history, cuda_graphs, progress, began))
