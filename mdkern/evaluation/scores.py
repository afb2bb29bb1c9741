"""What a model says of masked texts: hidden states, and log-probabilities of given tokens without rows x vocabulary
memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mdkern.kernels import vocab_projection
from mdkern.kernels.head.reference import finish_logits
from mdkern.models.denoiser import Denoiser, Head

CHUNK_ENTRIES = 1 << 26  # float32 entries of rows x D held at a time


def rounded_once(denoisers: Mapping[str, Denoiser], rows: int) -> dict[str, Denoiser]:
    """The denoisers for passes over at most so many positions; the weights of those in 8 bits are rounded now."""
    return {name: model if model.precision is None else model.prepared(rows) for name, model in denoisers.items()}


def masked_hidden(
    denoiser: Denoiser, ids: Tensor, masked: Tensor, t: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Hidden states ``[B * L, D]`` of texts ``[B, L]`` with the mask where `masked` says, at times ``t [B]``.

    Those of a block-causal model are given the blocks before a position's own without masks.
    """
    texts = torch.where(masked, denoiser.mask_id, ids)
    if denoiser.block_causal is not None:
        return denoiser.paired_hidden(texts, ids, attention_mask).flatten(0, 1)
    return denoiser.hidden(texts, t.float() if denoiser.time_conditioning else None, None, attention_mask).flatten(0, 1)


def sum_by_text(values: Tensor, row: Tensor, texts: Tensor) -> Tensor:
    """Sums of ``values [M]`` over each text, float64 ``[B]``; ``row [M]``: where they are in the flat ``[B, L]``."""
    total = torch.zeros(len(texts), dtype=torch.float64, device=texts.device)
    return total.index_add(0, row // texts.shape[1], values.double())


def target_log_prob(
    head: Head,
    hidden: Tensor,  # [N, D]
    row_index: Tensor,  # [M]
    target: Tensor,  # [M]
) -> Tensor:
    """Log-probability of one given token for each row.

    The normaliser comes from the fused projection; the token's own logit is one dot product for each row.

    Args:
        head: the output layer; with ``weight=None`` the rows of `hidden` are logits.
        hidden: floating ``[N, D]``.
        row_index: int64 ``[M]``, rows of `hidden`.
        target: int64 ``[M]``, the tokens.

    Returns:
        float32 ``[M]``, nats; -inf for tokens that can never be produced; NaN where the logits hold one.
    """
    keys = torch.zeros((len(row_index), 3), dtype=torch.int64, device=hidden.device)
    seed = torch.zeros((), dtype=torch.int64, device=hidden.device)
    shaping: dict[str, Any] = {"scale": head.scale, "soft_cap": head.soft_cap, "weight_scale": head.weight_scale}
    normaliser = vocab_projection(hidden, head.weight, head.bias, row_index, 0.0, seed, keys, **shaping).logsumexp
    return target_logit(head, hidden, row_index, target) - normaliser


def target_logit(
    head: Head,
    hidden: Tensor,  # [N, D]
    row_index: Tensor,  # [M]
    target: Tensor,  # [M]
) -> Tensor:
    """Logit of one given token for each row, float32 ``[M]``: the arguments are those of `target_log_prob`."""
    logit = torch.empty(len(row_index), dtype=torch.float32, device=hidden.device)
    chunk = max(1, CHUNK_ENTRIES // hidden.shape[1])
    for start in range(0, len(row_index), chunk):
        part = slice(start, start + chunk)
        states, tokens = hidden[row_index[part]], target[part]
        if head.weight is None:
            product = states.gather(1, tokens[:, None])[:, 0].float()
        else:
            product = (states.float() * head.weight[tokens].float()).sum(-1)
            if head.weight_scale is not None:
                product = product * head.weight_scale[tokens]
        logit[part] = finish_logits(product, head.bias[tokens], head.scale, head.soft_cap)
    return logit
