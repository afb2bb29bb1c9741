"""`SampleOutput`, which `sample` returns: how it is made from the outcome of a run, and how outputs are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from mdkern.engine.end_of_text import End, find_end
from mdkern.engine.request import Request, rows_of
from mdkern.engine.state import STOP_REASONS, Outcome
from mdkern.models import Denoiser
from mdkern.plan import GIVEN


@dataclass(frozen=True)
class History:
    """When, and by which model, each position was revealed."""

    step: Tensor  # int64 [N, L]: 0..T-1, T for the closing pass, -1 where the input gave the token
    model: Tensor  # int64 [N, L]: index into `models`, -1 where no model revealed it
    models: tuple[str, ...]
    steps: int  # the largest T of the call
    own_steps: Tensor | None = None  # int64 [N], T of each sequence
    # float32 [N, L]: log-probability of each token, in nats, in the pass that revealed it: under the model's
    # distribution, or the sampler's for decoders with of="sampler". NaN where no model revealed it.
    log_prob: Tensor | None = None

    def draft(self, sequences: Tensor, step: int, mask_id: int) -> Tensor:
        """The texts as they were before a step, ``[N, L]``: what was revealed at that step or later is masked.

        Of decoders that write a position more than once, only the last time is known; until then it counts as masked.
        """
        return torch.where(self.step >= step, mask_id, sequences)


@dataclass
class SampleOutput(ModelOutput):
    """What `sample` returns.

    Attributes:
        sequences: int64 ``[N, L]``, without masks.
        sample_ids: int64 ``[N]``, the sample numbers.
        nfe: number of forward passes of each sequence, int64 ``[N]`` for each name of a denoiser.
        commits: with ``cache="block"`` how many of them revealed nothing, because they only ran a finished block, or
            one of the prompt, for its keys and values; else None.
        tokens_per_forward: float32 ``[N]``, tokens revealed per forward pass.
        steps: int64 ``[N]``, steps until the last token was revealed, whether or not they needed a forward pass.
        stop_reason: ``"all_revealed"`` or ``"end_of_text"``, for each sequence.
        lengths: int64 ``[N]``, number of tokens of each text before the first end of text that was written, prompt
            included, padding not counted; of the whole text if there is none. An end of text that was given, in the
            prompt or between masks, counts as any other token.
        prompt_lengths: int64 ``[N]``, number of tokens before the first one that was written, padding not counted.
        attention_mask: bool ``[N, L]``, False at padding; None: no padding.
        timings: seconds spent on ``plan``, on each denoiser by its name, and in ``total``.
        flops_saved: share of the FLOPs that the schedule saves compared with the most expensive denoiser in the same
            forward passes; None if a model's FLOPs are not known, or a cache shortens passes.
        seed: the seed used.
        history: when and by which model each position was revealed, if `return_history` was set.
    """

    sequences: Tensor | None = None
    sample_ids: Tensor | None = None
    nfe: dict[str, Tensor] | None = None
    commits: dict[str, Tensor] | None = None
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
        """The texts, each without its end of text and without padding.

        Args:
            tokenizer: a tokenizer of transformers, or any object with a method ``decode(ids, **options)``.
            skip_prompt: leave out everything before the first token that was written.
            options: passed on to the tokenizer.
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


def summarise(request: Request, sequences: Tensor, outcome: Outcome, timings: dict[str, float]) -> SampleOutput:
    """The output for the samples of a request that were finished."""
    finished = outcome.finished.nonzero()[:, 0]
    request, sequences = rows_of(request, finished), sequences[finished]
    step, model, reason = (x[finished] for x in (outcome.step, outcome.model, outcome.stop_reason))
    log_prob = outcome.log_prob[finished]
    nfe = {name: passes[finished] for name, passes in outcome.nfe.items()}
    commits = outcome.commits and {name: passes[finished] for name, passes in outcome.commits.items()}
    revealed = (model != GIVEN).sum(-1)  # positions that were filled with end of text have a step but no model
    passes = sum(nfe.values(), torch.zeros_like(reason))
    history = History(step, model, tuple(request.denoisers), request.most_steps, request.steps, log_prob)
    output = SampleOutput(
        sequences=sequences,
        sample_ids=request.sample_ids,
        nfe=nfe,
        commits=commits,
        tokens_per_forward=revealed / passes,
        steps=torch.minimum(step.amax(-1) + 1, request.steps),
        stop_reason=[STOP_REASONS[number] for number in reason.tolist()],
        lengths=tokens_before(find_end(sequences, request.masked, request.mask_id, request.eos_ids), request),
        prompt_lengths=tokens_before(find_end(request.input_ids, request.masked, request.mask_id, ()), request),
        attention_mask=request.attention_mask,
        timings=timings,
        seed=request.seed,
        history=history if request.record else None,
    )
    output.flops_saved = flops_saved(request, output)
    return output


def tokens_before(end: End, request: Request) -> Tensor:
    """int64 ``[N]``: number of tokens of each text before its end, or of all its tokens if it has none."""
    column = torch.arange(request.input_ids.shape[1], device=request.device)
    before = (column < end.column) | ~end.found
    return (before if request.attention_mask is None else before & request.attention_mask).sum(-1)


def flops_saved(request: Request, output: SampleOutput) -> float | None:
    """`counted_saving` of an output; None if a cache shortens passes."""
    assert output.nfe is not None
    assert output.tokens_per_forward is not None
    if request.cache != "none":
        return None
    return counted_saving(request.denoisers, output.nfe, output.tokens_per_forward, request.input_ids.shape[1])


def counted_saving(
    denoisers: Mapping[str, Denoiser], nfe: Mapping[str, Tensor], tokens_per_forward: Tensor, length: int
) -> float | None:
    """Share of FLOPs saved compared with the most expensive denoiser in the same forward passes."""
    passes = {name: int(count.sum()) for name, count in nfe.items()}
    if not sum(passes.values()):
        return None
    rows = max(1, round(float(tokens_per_forward.mean())))
    cost = {name: denoiser.flops(length, rows) for name, denoiser in denoisers.items()}
    known = {name: flops for name, flops in cost.items() if flops is not None}
    if len(known) < len(cost):
        return None
    return 1.0 - sum(passes[name] * known[name] for name in known) / (max(known.values()) * sum(passes.values()))


def joined(
    parts: Sequence[Any], join: Callable[[list[Tensor]], Tensor], seconds: Callable[[Sequence[float]], float] = max
) -> Any:
    """Join outputs: tensors by `join`, lists end to end, times by `seconds`; everything else is that of the first."""
    first = parts[0]
    if isinstance(first, Tensor):
        return join(list(parts))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        return type(first)(**{name: joined([getattr(part, name) for part in parts], join, seconds) for name in names})
    if isinstance(first, dict):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: joined([part[key] for part in parts if key in part], join, seconds) for key in keys}
    return seconds(parts) if isinstance(first, float) else first
