"""Held-out likelihood of a denoiser: the negative evidence lower bound (NELBO) of Sahoo et al., 2406.07524, eq. 10."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdkern.models import DiT
from training.batches import Array, even_windows, masked_batch, step_generator, stratified_times
from training.loop import World

TIME_BINS = 10


def row_losses(model: DiT, input_ids: Tensor, t: Tensor, row_index: Tensor, targets: Tensor) -> Tensor:
    """-log p of the targets at masked rows, nats, float32 ``[M]``; see `training.batches.MaskedBatch`."""
    hidden = model.hidden(input_ids, t if model.config.time_conditioning else None)
    logits = model.logits(hidden.flatten(0, 1)[row_index])
    return F.cross_entropy(logits.float(), targets, reduction="none")


class MaskedLoss(nn.Module):
    """The NELBO in nats a token: ``scale * sum over masked rows of weight * -log p``.

    `scale` is processes / (tokens of the global batch), so that the sum over micro-batches, averaged over processes,
    is the mean over the global batch.
    """

    def __init__(self, model: DiT, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, input_ids: Tensor, t: Tensor, row_index: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (row_losses(self.model, input_ids, t, row_index, targets) * weights).sum() * self.scale


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
    device = world.device
    t_all, sequence_nelbo, sequence_nll, sequence_masked = [], [], [], []
    batch_means = []
    for number in range(math.ceil(samples / batch_size)):
        generator = step_generator(seed, number, stream=1)
        chosen = np.arange(number * batch_size, (number + 1) * batch_size) % len(windows)
        t = stratified_times(batch_size, eps, generator)
        uniforms = generator.random((batch_size, length), dtype=np.float32)
        # Times come in ascending order but for a rotation: shuffled, so that no window always gets the large ones.
        batch = masked_batch(windows[chosen], generator.permutation(t), uniforms, model.config.mask_id)
        on_device = [x.to(device) for x in batch]
        with world.autocast():
            nll = row_losses(model, *on_device[:4])
        sequence = batch.row_index // length
        real = (batch.weights > 0).double()
        sums = [torch.zeros(batch_size, dtype=torch.float64) for _ in range(3)]
        for total, values in zip(sums, (nll.cpu().double() * batch.weights, nll.cpu().double() * real, real)):
            total.index_add_(0, sequence, values)
        t_all.append(batch.t.double())
        sequence_nelbo.append(sums[0] / length)
        sequence_nll.append(sums[1])
        sequence_masked.append(sums[2])
        batch_means.append(float(sums[0].mean()) / length)
    bins = (torch.cat(t_all) * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    by_bin = [torch.zeros(TIME_BINS, dtype=torch.float64) for _ in range(4)]
    ones = torch.ones(len(bins), dtype=torch.float64)
    parts = (torch.cat(sequence_nelbo), torch.cat(sequence_nll), torch.cat(sequence_masked), ones)
    for total, values in zip(by_bin, parts):
        total.index_add_(0, bins, values)
    nelbo = float(np.mean(batch_means))
    count = len(batch_means)
    error = float(np.std(batch_means, ddof=1)) / math.sqrt(count) if count > 1 else None
    return {
        "nelbo_nats_per_token": nelbo,
        "standard_error": error,
        "perplexity_bound": math.exp(nelbo),
        "samples": len(bins),
        "windows": len(windows),
        "length": length,
        "by_t": [
            {
                "t": [i / TIME_BINS, (i + 1) / TIME_BINS],
                "cross_entropy": float(by_bin[1][i] / by_bin[2][i]),
                "nelbo": float(by_bin[0][i] / by_bin[3][i]),
            }
            for i in range(TIME_BINS)
        ],
    }
