"""Logits processors: those of transformers that make sense without an order of writing, and any other callables.

A processor is called for the rows that want a token. A row is one position of a sequence in which any other position
may still be masked.

================================================================ =======================================================
of transformers                                                  here
================================================================ =======================================================
Temperature, TopK, TopP, TopH, MinP, Typical, Epsilon, Eta,      as they are: they read the logits of one position
SuppressTokens, InfNanRemove, LogitNormalization,
BarkEosPrioritizer; NoBadWords and SequenceBias of single tokens
RepetitionPenalty                                                called with the whole sequence, without masks, padding
MinLength, MinNewTokensLength, ForcedBOS, ForcedEOS,             called with as many ids as there are tokens before the
ExponentialDecayLengthPenalty, SuppressTokensAtBegin,            position, padding not counted: they read only how many
AlternatingCodebooks
NoRepeatNGram, EncoderNoRepeatNGram, PrefixConstrained,          refused: they read the tokens before a position, which
Watermark, SynthIDTextWatermark, NoBadWords and SequenceBias of  may be masked
several tokens, whatever is not named here
EncoderRepetitionPenalty, Whisper's, Dia's                       refused: they depend on the batch of `generate`
ClassifierFreeGuidance, UnbatchedClassifierFreeGuidance          refused: `guidance_scale` does it
================================================================ =======================================================

Any other callable is given the ids ``[M, L]`` as they are, masks and padding included, and float32 logits ``[M, V]``.
If it has a parameter ``positions``, it is also given the rows' columns in the ids, int64 ``[M]``. The logits that it
returns for ids that may never be drawn, such as the mask, are ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

AS_THEY_ARE = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "BarkEosPrioritizerLogitsProcessor",
}
BY_LENGTH = {
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor",
}
GUIDANCE = {"ClassifierFreeGuidanceLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor"}
OF_A_BATCH = ("Whisper", "Dia", "EncoderRepetition")


class Rows(NamedTuple):
    """The rows that a processor is called for."""

    input_ids: Tensor  # int64 [M, L], masks and padding included
    attended: Tensor | None  # bool [M, L], False at padding
    column: Tensor  # int64 [M]
    text_position: Tensor  # int64 [M], padding not counted
    mask_id: int


@dataclass(frozen=True)
class Processors:
    """The processors of a call, applied one after the other."""

    kept: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]  # each with the function that calls it

    @staticmethod
    def of(hook: Any) -> Processors | None:
        """The processors of a callable, or of a list of them; None for none.

        Raises:
            TypeError: something else.
            ValueError: a processor of transformers that cannot work here.
        """
        processors = flat("logits_processor", hook)
        return Processors(tuple((way_of(processor), processor) for processor in processors)) if processors else None

    def __call__(self, rows: Rows, logits: Tensor, suppressed: Tensor) -> Tensor:
        """Apply the processors to float32 logits ``[M, V]``; ids that are ``suppressed [V]`` stay impossible.

        Raises:
            ValueError: a processor returned something other than logits.
        """
        for ask, processor in self.kept:
            shape = logits.shape
            logits = ask(processor, rows, logits)
            if not isinstance(logits, Tensor) or logits.shape != shape or not logits.is_floating_point():
                kind = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"{name_of(processor)} must return logits {list(shape)}, not {kind}")
            logits = logits.float().masked_fill(suppressed, -torch.inf)
        return logits


def flat(name: str, hook: Any) -> list[Any]:
    """The callables of a hook, which is None, a callable, or a list of hooks."""
    if hook is None:
        return []
    if isinstance(hook, list | tuple):
        return [item for part in hook for item in flat(name, part)]
    if not callable(hook):
        raise TypeError(f"{name} must be callable, as those of transformers are, not {type(hook).__name__}")
    return [hook]


def name_of(hook: Any) -> str:
    return getattr(hook, "__name__", type(hook).__name__)


def transformers_name(hook: Any) -> str | None:
    """The name of the class of transformers whose ``__call__`` a hook has; None if it has one of its own."""
    definer = next(kind for kind in type(hook).__mro__ if "__call__" in vars(kind))
    return definer.__name__ if definer.__module__.startswith("transformers.") else None


def way_of(processor: Any) -> Callable[..., Any]:
    """The function that calls a processor as it needs to be called."""
    name = transformers_name(processor)
    if name is None:
        return way_of_ones_own(processor)
    if name in AS_THEY_ARE:
        return as_it_is
    if name in BY_LENGTH:
        return by_length
    if name == "RepetitionPenaltyLogitsProcessor":
        return without_masks
    ours = f"{type(processor).__name__} cannot be right here"
    if name == "SequenceBiasLogitsProcessor":
        biases = processor.sequence_bias
        sequences = biases if isinstance(biases, dict) else [sequence for sequence, _ in biases]
        if all(len(sequence) == 1 for sequence in sequences):
            return as_it_is
        ours += " with sequences of several tokens"
    if name in GUIDANCE:
        raise ValueError(
            f"logits_processor: {ours}, as it pairs the rows of its own batch: give guidance_scale instead"
        )
    if name.startswith(OF_A_BATCH):
        raise ValueError(f"logits_processor: {ours}: it belongs to the batch of a loop that writes from left to right")
    raise ValueError(
        f"logits_processor: {ours}: it reads the tokens before a position, of which some may still be masked. Give a"
        " callable of your own, (input_ids, scores, positions) -> scores, that knows about masks"
    )


def way_of_ones_own(processor: Any) -> Callable[..., Any]:
    try:
        signature = inspect.signature(processor)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return as_it_is
    with_positions = "positions" in signature.parameters
    try:
        signature.bind(*((None, None)), **({"positions": None} if with_positions else {}))
    except TypeError as error:
        raise TypeError(
            f"logits_processor: {name_of(processor)} must take (input_ids, scores) or (input_ids, scores, positions),"
            f" but takes {signature}"
        ) from error
    return at_positions if with_positions else as_it_is


def as_it_is(processor: Any, rows: Rows, logits: Tensor) -> Any:
    return processor(rows.input_ids, logits)


def at_positions(processor: Any, rows: Rows, logits: Tensor) -> Any:
    return processor(rows.input_ids, logits, positions=rows.column)


def without_masks(processor: Any, rows: Rows, logits: Tensor) -> Any:
    """Call a processor with ids in which padding is replaced by the mask, whose logit stays -inf."""
    if rows.attended is None:
        return processor(rows.input_ids, logits)
    return processor(torch.where(rows.attended, rows.input_ids, rows.mask_id), logits)


def by_length(processor: Any, rows: Rows, logits: Tensor) -> Any:
    """Call a processor for each position in turn, with as many ids as there are tokens before the position."""
    out = torch.empty_like(logits)
    for length in rows.text_position.unique().tolist():
        same = rows.text_position == length
        out[same] = processor(rows.input_ids[same, :length], logits[same])
    return out
