"""Held-out likelihood of a denoiser: the negative evidence lower bound (NELBO) of Sahoo et al., 2406.07524, eq. 10."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.evaluation.intervals import estimate
from mdkern.models import DiT
from training.batches import Array, even_windows, masked_batch, step_generator, stratified_times
from training.loop import World
from training.objectives import noisy_hidden
from training.pairs import Epochs, Noise, Pairs, response_batches

TIME_BINS = 10


def row_losses(model: DiT, input_ids: Tensor, t: Tensor, row_index: Tensor, targets: Tensor) -> Tensor:
    """-log p of the targets at masked rows, nats, float32 ``[M]``; see `training.batches.MaskedBatch`.

    Of a block-causal model it is the probability given the block's other tokens and the blocks before it without masks.
    """
    clean_ids = input_ids.flatten().scatter(0, row_index, targets).view_as(input_ids)
    hidden = noisy_hidden(model, input_ids, clean_ids, t)
    logits = model.logits(hidden.flatten(0, 1)[row_index])
    return F.cross_entropy(logits.float(), targets, reduction="none")


def weighted_losses(
    model: DiT, input_ids: Tensor, t: Tensor, row_index: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """`row_losses` times their weights, whose sum over a batch is its part of the NELBO, nats, float32 ``[M]``."""
    return row_losses(model, input_ids, t, row_index, targets) * weights


@torch.inference_mode()
def held_out_nelbo(
    model: DiT,
    tokens: Array,
    length: int,
    samples: int,
    batch_size: int,
    world: World,
    seed: int = 0,
    eps: float = 1e-3,
) -> dict[str, Any]:
    """Estimate the NELBO a token on windows spread evenly over a token file.

    Of a block-causal model it bounds the likelihood of the blocks one after the other (Arriola et al., 2503.09573).

    Args:
        model: the denoiser, on ``world.device``.
        tokens: ``[count]`` token ids.
        length: of a window.
        samples: (window, t) pairs; windows are used again, with other t, when there are fewer.
        batch_size: pairs at once; t is stratified over each batch.

    Returns a dict: the bound and its standard error (nats a token; None for one batch), and for each of 10 bins of t
    the mean cross-entropy of a masked token and the mean of the bound's integrand.
    """
    windows = even_windows(tokens, samples, length)
    parts = []  # of each batch [4, B]: t, and by sequence the bound, the cross-entropy and the number of masked tokens
    for number in range(math.ceil(samples / batch_size)):
        generator = step_generator(seed, number, stream=1)
        chosen = np.arange(number * batch_size, (number + 1) * batch_size) % len(windows)
        t = stratified_times(batch_size, eps, generator)
        uniforms = generator.random((batch_size, length), dtype=np.float32)
        # Times ascend up to a rotation. They are shuffled, or one window would always get the large ones.
        batch = masked_batch(windows[chosen], generator.permutation(t), uniforms, model.config.mask_id)
        with world.autocast():
            losses = row_losses(model, *(x.to(world.device) for x in batch[:4])).cpu().double()
        real = (batch.weights > 0).double()
        by_row = torch.stack((losses * batch.weights / length, losses * real, real))
        sums = by_row.new_zeros(3, batch_size).index_add_(1, batch.row_index // length, by_row)
        parts.append(torch.cat((batch.t.double()[None], sums)))
    t_of, *sums_of = torch.cat(parts, 1)
    bins = (t_of * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    values = torch.stack((*sums_of, torch.ones_like(t_of)))
    nelbo, cross_entropy, masked, count = values.new_zeros(4, TIME_BINS).index_add_(1, bins, values)
    bound = estimate(torch.stack([part[1].mean() for part in parts]))
    return {
        "nelbo_nats_per_token": bound.mean,
        "standard_error": bound.standard_error if bound.count > 1 else None,
        "perplexity_bound": math.exp(bound.mean),
        "samples": len(bins),
        "windows": len(windows),
        "length": length,
        "by_t": [
            {
                "t": [i / TIME_BINS, (i + 1) / TIME_BINS],
                "cross_entropy": float(cross_entropy[i] / masked[i]),
                "nelbo": float(nelbo[i] / count[i]),
            }
            for i in range(TIME_BINS)
        ],
    }


@torch.inference_mode()
def held_out_responses(
    model: DiT, pairs: Pairs, samples: int, batch_size: int, world: World, seed: int = 0, multiple: int = 1
) -> dict[str, Any]:
    """The bound on the likelihood of responses given their prompts, and the cross-entropy of a masked token by kind.

    Args:
        model: the denoiser, on ``world.device``.
        pairs: held-out ones. They are used again, with other times, if they are fewer than the samples.
        samples: (pair, t) pairs, rounded up to whole batches.
        batch_size: pairs at once; t is stratified over each batch.
        multiple: of which the width of a batch is one.

    Returns a dict: the bound in nats a response (its text and closing end of text, without the padding) and its
    standard error; for each of 10 bins of t the cross-entropy of masked tokens; and over all t that of the text, of the
    closing end of text and of the padding. A value without tokens is None.
    """
    config = model.config
    assert isinstance(config.eos_id, int)
    noise = Noise("sft", config.mask_id, config.eos_id, config.vocab_size)
    source = Epochs(pairs, batch_size, config.eos_id, seed, multiple)
    losses, times, kinds, bounds = [], [], [], []
    for number in range(math.ceil(samples / batch_size)):
        generator = step_generator(seed, number, stream=1)
        padded = source(number)
        t = generator.permutation(stratified_times(batch_size, noise.eps, generator))
        uniforms = generator.random(padded.ids.shape, dtype=np.float32)
        [batch] = response_batches(noise, padded, t, uniforms, uniforms, np.zeros(batch_size, dtype=bool))
        with world.autocast():
            on_device = (x.to(world.device) for x in batch)
            noisy_ids, clean_ids, on_t, rows, *_ = on_device
            targets = clean_ids.flatten()[rows]
            found = row_losses(model, noisy_ids, on_t, rows, targets).cpu().double()
        real = batch.weights > 0
        rows, found = batch.row_index[real], found[real]
        sequence, column = rows // padded.ids.shape[1], rows % padded.ids.shape[1]
        end = torch.from_numpy(closing_end(padded.ids, config.eos_id))[sequence]
        kind = (column >= end).long() + (column > end).long()
        of_text = torch.where(kind < 2, found / batch.t[sequence], 0.0)
        bounds.append(torch.zeros(batch_size, dtype=torch.float64).index_add_(0, sequence, of_text))
        losses.append(found)
        times.append(batch.t[sequence])
        kinds.append(kind)
    loss, kind = torch.cat(losses), torch.cat(kinds)
    bins = (torch.cat(times) * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    bound = estimate(torch.stack([part.mean() for part in bounds]))
    return {
        "nelbo_nats_per_response": bound.mean,
        "standard_error": bound.standard_error if bound.count > 1 else None,
        "samples": batch_size * len(bounds),
        "pairs": len(pairs),
        "by_t": [
            {"t": [i / TIME_BINS, (i + 1) / TIME_BINS], "cross_entropy": mean_or_none(loss[bins == i])}
            for i in range(TIME_BINS)
        ],
        "by_kind": {name: mean_or_none(loss[kind == i]) for i, name in enumerate(("text", "end of text", "padding"))},
    }


def closing_end(ids: Array, eos_id: int) -> Array:
    """Where the run of end-of-text tokens begins that closes each row of ``ids [B, L]``, int64 ``[B]``."""
    reversed_run = np.logical_and.accumulate((ids == eos_id)[:, ::-1], axis=1)
    found: Array = ids.shape[1] - reversed_run.sum(1)
    return found


def mean_or_none(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
