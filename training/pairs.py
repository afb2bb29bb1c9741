"""Prompts with their responses: files, batches for fine-tuning, and the noise of its objectives.

A file has one JSON object a line with ``prompt`` and ``response``, each a text or a list of token ids; other keys are
left alone, but ``prompt_ids`` and ``response_ids``, which the output of ``mdkern sample --prompts`` has, are read
instead, because a text that a model wrote may have other tokens when it is tokenized. Texts of prompt and response are
tokenized apart, and the response is closed by one end of text. In a batch, responses are padded with end of text to one
length, and the padding is learnt as any other token (LLaDA, 2502.09992, section 2.3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdkern.digest import digest
from mdkern.files import open_text
from training.batches import ROW_MULTIPLE, Array, Floats, own_shards, step_generator, stratified_times
from training.data import TextEncoder

NORMALISERS = "sequence", "token", "batch"
ORDER_STREAM = 2  # of `step_generator`: the order of an epoch's pairs
ROW_PARTS = 8  # of a batch's tokens: numbers of rows are multiples of one, so that there are few compilations


@dataclass(frozen=True)
class Pairs:
    """Token ids of prompts and responses, one after the other in one array.

    Attributes:
        tokens: int ``[count]``; every response ends with one end of text.
        starts: int64 ``[N + 1]``: pair n is ``tokens[starts[n] : starts[n + 1]]``.
        prompt_lengths: int64 ``[N]``, tokens of its beginning that are the prompt.
    """

    tokens: Array
    starts: Array
    prompt_lengths: Array

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> Array:
        """Tokens of each pair, int64 ``[N]``."""
        return np.diff(self.starts)

    @cached_property
    def sha256(self) -> str:
        return digest([torch.from_numpy(np.asarray(x).astype(np.int64)) for x in (self.tokens, self.starts)]
                      + [torch.from_numpy(self.prompt_lengths.astype(np.int64))])  # fmt: skip

    def select(self, index: Array) -> Pairs:
        """The pairs with these indices, in their order."""
        parts = [self.tokens[self.starts[n] : self.starts[n + 1]] for n in index]
        tokens = np.concatenate(parts) if parts else self.tokens[:0]
        return Pairs(tokens, np.cumsum([0, *map(len, parts)]), self.prompt_lengths[index])

    def padded(self, index: Array, eos_id: int, multiple: int = 1) -> PaddedPairs:
        """Pairs as a batch, as wide as the longest, rounded up to a multiple."""
        lengths = self.lengths[index]
        width = -(-int(lengths.max()) // multiple) * multiple
        ids = np.full((len(index), width), eos_id, dtype=np.int64)
        for row, (start, length) in enumerate(zip(self.starts[index], lengths)):
            ids[row, :length] = self.tokens[start : start + length]
        return PaddedPairs(ids, self.prompt_lengths[index])


class PaddedPairs(NamedTuple):
    """A batch of pairs: ``ids [B, L]`` int64, and int64 ``prompt_lengths [B]``; the rest of each row is response."""

    ids: Array
    prompt_lengths: Array

    @property
    def response(self) -> Array:
        """bool ``[B, L]``."""
        found: Array = np.arange(self.ids.shape[1]) >= self.prompt_lengths[:, None]
        return found


def read_pairs(
    path: Path, encoder: TextEncoder | None, eos_id: int, vocab_size: int, finished_only: bool = False
) -> Pairs:
    """Read a file of pairs, plain or .xz. End-of-text tokens that close a response are taken for one.

    Args:
        encoder: the tokenizer; None: the file has token ids.
        vocab_size: ids must be below it.
        finished_only: leave out lines whose ``stop_reason`` is not ``end_of_text``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no pair (it is named), texts without a tokenizer, or no line at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file of pairs: {path}")
    tokens: list[int] = []
    starts, prompt_lengths = [0], []
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
                if finished_only and record.get("stop_reason") != "end_of_text":
                    continue
                has_ids = "prompt_ids" in record and "response_ids" in record
                prompt, response = (record[f"{name}_ids" if has_ids else name] for name in ("prompt", "response"))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{where}: not a JSON object with `prompt` and `response`") from None
            before, after = (token_ids(value, encoder, vocab_size, where) for value in (prompt, response))
            while after and after[-1] == eos_id:
                after.pop()
            tokens += [*before, *after, eos_id]
            starts.append(len(tokens))
            prompt_lengths.append(len(before))
    if not prompt_lengths:
        raise ValueError(f"{path} has no pairs{' that are finished' if finished_only else ''}")
    return Pairs(np.array(tokens, dtype=np.int32), np.array(starts), np.array(prompt_lengths))


def token_ids(value: Any, encoder: TextEncoder | None, vocab_size: int, where: str) -> list[int]:
    """A prompt or response as ids. Raises ValueError on anything but a text or a list of known ids."""
    if isinstance(value, str):
        if encoder is None:
            raise ValueError(f"{where}: prompt and response are texts: give --tokenizer")
        return encoder.encode([value])
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < vocab_size for i in value):
        raise ValueError(f"{where}: prompt and response must be texts, or lists of ids from 0 to {vocab_size - 1}")
    return list(value)


Source = Callable[[int], PaddedPairs]  # the pairs of a step's global batch


@dataclass(frozen=True)
class Epochs:
    """A step's pairs: each epoch goes through all of them once, in an order of its own. A pure function of the step.

    A batch may end an epoch and begin the next.
    """

    pairs: Pairs
    batch_size: int
    eos_id: int
    seed: int
    multiple: int = 1  # of which the width of a batch is one

    def __call__(self, step: int) -> PaddedPairs:
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, inside = np.divmod(places, len(self.pairs))
        orders = {epoch: self.order(epoch) for epoch in np.unique(epochs).tolist()}
        index = np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), inside)])
        return self.pairs.padded(index, self.eos_id, self.multiple)

    def order(self, epoch: int) -> Array:
        return step_generator(self.seed, epoch, ORDER_STREAM).permutation(len(self.pairs))


class ResponseBatch(NamedTuple):
    """A batch for fine-tuning. Prompts are never masked.

    Attributes:
        noisy_ids: int64 ``[B, L]``, responses with masks or other tokens in them.
        clean_ids: int64 ``[B, L]``.
        t: float32 ``[B]``, the probability of being noisy.
        row_index: int64 ``[M]``, rows of ``[B * L]`` whose clean tokens are predicted, padded with other rows.
        weights: float32 ``[M]`` of their cross-entropies, 0 in the padding.
        rollout_index: int64 ``[R]``, masked rows that take the model's own tokens before, padded with other rows; R = 0
            where there is no roll-out.
        draws: float32 ``[R]`` in [0, 1), by which these tokens are drawn; below 0 in the padding.
    """

    noisy_ids: Tensor
    clean_ids: Tensor
    t: Tensor
    row_index: Tensor
    weights: Tensor
    rollout_index: Tensor
    draws: Tensor


@dataclass(frozen=True)
class Noise:
    """Noise, labels and weights of an objective for a batch of pairs, as one process's share of the global loss.

    ``sft`` (LLaDA's supervised fine-tuning): t ~ U[eps, 1] a sequence, stratified; each response token is masked with
    probability t; the masked ones are predicted, with weight 1/t.

    The other three are DMax's on-policy uniform training and what it is compared with: each response token is noisy
    with probability `ratio`, and all response tokens up to `tail` end-of-text tokens are predicted, with weight 1.
    Noisy tokens are masks in ``masked``, tokens drawn uniformly in ``uniform``, and in ``oput`` the model's own
    predictions in a share `share_on_policy` of the sequences, masks in the others. ``oput`` with a share of 0 is
    ``masked``.

    Attributes:
        objective: one of those names.
        normalise: what the weighted losses are divided by. ``"sequence"`` (LLaDA, and DMax): each sequence's sum by its
            number of response tokens (DMax: of labels), then the sum by the number of sequences. ``"token"`` (SMDM): by
            the number of response tokens (labels) of the batch. ``"batch"``: by the number of sequences.
        masked_labels: only noisy tokens are predicted in the last three objectives.
    """

    objective: str
    mask_id: int
    eos_id: int
    vocab_size: int
    normalise: str = "sequence"
    eps: float = 1e-3
    ratio: tuple[float, float] = (0.75, 0.75)
    tail: int = 32
    share_on_policy: float = 0.5
    masked_labels: bool = False

    @property
    def rolls_out(self) -> bool:
        return self.objective == "oput" and self.share_on_policy > 0

    def times(self, count: int, generator: np.random.Generator) -> Floats:
        """The probability of each sequence's tokens to be noisy, float32 ``[count]``."""
        if self.objective == "sft":
            return stratified_times(count, self.eps, generator)
        low, high = self.ratio
        return (low + (high - low) * stratified_times(count, 0.0, generator)).astype(np.float32)

    def labels(self, pairs: PaddedPairs, noisy: Array) -> Array:
        """The positions that are predicted, bool ``[B, L]``."""
        if self.objective == "sft":
            return noisy
        closing = np.logical_and.accumulate((pairs.ids == self.eos_id)[:, ::-1], axis=1)[:, ::-1] & pairs.response
        found = pairs.response & (~closing | (closing.cumsum(1) <= self.tail))
        return found & noisy if self.masked_labels else found

    def losses_weights(self, labels: Array, pairs: PaddedPairs, t: Floats, whole: Counts) -> Floats:
        """The weight of each label, float32 ``[B, L]``, of a shard of a batch that has these `whole` counts."""
        weights = labels / t[:, None] if self.objective == "sft" else labels.astype(np.float64)
        if self.normalise == "sequence":
            own = pairs.response if self.objective == "sft" else labels
            weights = weights / np.maximum(own.sum(1), 1)[:, None] / whole.sequences
        else:
            weights = weights / (whole.tokens if self.normalise == "token" else whole.sequences)
        return weights.astype(np.float32)


class Counts(NamedTuple):
    """Of a global batch: sequences, and response tokens or labels."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class ResponseBatches:
    """The batches of a fine-tuning: ``batches(step)`` gives this rank's micro-batches, as `MaskedBatches` does.

    Their weights are those of the global batch: the sum of the weighted losses of all micro-batches of all ranks is the
    objective.

    Attributes:
        source: step -> the pairs of the global batch.
        random_length: the share of steps whose batch is cut to a random number of columns, a multiple of `multiple`, so
            that the model sees other lengths than the longest (LLaDA's pre-training).
    """

    source: Source
    noise: Noise
    batch_size: int  # of all ranks and micro-batches together
    seed: int
    random_length: float = 0.0
    multiple: int = 1
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        own_shards(self.batch_size, self.rank, self.world, self.accumulate)

    def __call__(self, step: int) -> list[ResponseBatch]:
        generator = step_generator(self.seed, step)
        pairs = self.cut(self.source(step), generator)
        t = self.noise.times(self.batch_size, generator)
        uniforms = generator.random(pairs.ids.shape, dtype=np.float32)
        draws = generator.random(pairs.ids.shape, dtype=np.float32)
        shift = generator.random()
        share = self.noise.share_on_policy if self.noise.rolls_out else 0.0
        on_policy = np.floor(np.arange(self.batch_size) * share + share + shift) > np.floor(
            np.arange(self.batch_size) * share + shift
        )
        return response_batches(
            self.noise, pairs, t, uniforms, draws, generator.permutation(on_policy),
            own_shards(self.batch_size, self.rank, self.world, self.accumulate),
        )  # fmt: skip

    def cut(self, pairs: PaddedPairs, generator: np.random.Generator) -> PaddedPairs:
        cut, place = generator.random(2)
        width = pairs.ids.shape[1]
        if cut >= self.random_length:
            return pairs
        most = width // self.multiple
        return PaddedPairs(pairs.ids[:, : self.multiple * (1 + int(place * most))], pairs.prompt_lengths)


def response_batches(
    noise: Noise,
    pairs: PaddedPairs,
    t: Floats,
    uniforms: Floats,
    draws: Floats,
    on_policy: Array,
    shards: Sequence[slice] = (slice(None),),
) -> list[ResponseBatch]:
    """The micro-batches of given random numbers.

    Args:
        t: float32 ``[B]``; a response token is noisy where its ``uniforms [B, L]`` is below it.
        draws: float32 ``[B, L]``, by which uniform noise and the roll-out choose their tokens.
        on_policy: bool ``[B]``, whose masks take the model's tokens.
        shards: the sequences of each micro-batch.
    """
    response = pairs.response
    noisy = response & (uniforms < t[:, None])
    labels = noise.labels(pairs, noisy)
    counted = response if noise.objective == "sft" else labels
    whole = Counts(len(pairs.ids), max(1, int(counted.sum())))
    weights = noise.losses_weights(labels, pairs, t, whole)
    if noise.objective == "uniform":
        drawn = (draws.astype(np.float64) * (noise.vocab_size - 1)).astype(np.int64)
        noisy_ids = np.where(noisy, drawn + (drawn >= noise.mask_id), pairs.ids)  # every id but the mask
    else:
        noisy_ids = np.where(noisy, noise.mask_id, pairs.ids)
    rolled = noisy & on_policy[:, None]
    batches = []
    for part in shards:
        width = pairs.ids[part].size
        usual = 0.0
        if noise.objective == "sft":  # as in `masked_batch`: nearly all batches have one shape
            count = int(response[part].sum())
            usual = count / 2 + 6 * math.sqrt(count) + pairs.ids.shape[1] / 2
        rows, real = chosen_rows(labels[part], int(usual))
        rollout, drawn_rows = np.zeros(0, np.int64), np.zeros(0, np.float32)
        if noise.rolls_out:
            likely = width * noise.share_on_policy * noise.ratio[1]
            rollout, there = chosen_rows(rolled[part], int(likely))
            drawn_rows = np.where(there, draws[part].reshape(-1)[rollout], np.float32(-1)).astype(np.float32)
        arrays = (
            noisy_ids[part], pairs.ids[part], t[part].copy(), rows,
            np.where(real, weights[part].reshape(-1)[rows], np.float32(0)), rollout, drawn_rows,
        )  # fmt: skip
        batches.append(ResponseBatch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)))
    return batches


def chosen_rows(chosen: Array, usual: int) -> tuple[Array, Array]:
    """Rows of ``chosen [B, L]`` in ``[B * L]``, followed by others, and which are real: int64 and bool ``[M]``.

    M is at least `usual`, a multiple of an eighth of the batch, and at most all of it, so that there are few shapes.
    All rows are distinct.
    """
    flat = chosen.reshape(-1)
    rows = np.flatnonzero(flat)
    multiple = max(1, min(max(ROW_MULTIPLE, len(flat) // ROW_PARTS), len(flat)))
    capacity = min(len(flat), math.ceil(max(usual, len(rows), 1) / multiple) * multiple)
    others = np.flatnonzero(~flat)[: capacity - len(rows)]
    return np.concatenate((rows, others)), np.arange(capacity) < len(rows)
