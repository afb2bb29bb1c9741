"""The losses of fine-tuning, supervised (LLaDA, 2502.09992) and on the model's own tokens (DMax)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.models import DiT
from mdkern.models.block_causal import paired_hidden


def noisy_hidden(model: DiT, noisy_ids: Tensor, clean_ids: Tensor, t: Tensor) -> Tensor:
    """Hidden states at the noisy text, ``[B, L, D]``; of a block-causal model each block sees the clean ones before."""
    if model.config.block_causal is not None:
        return paired_hidden(model, noisy_ids, clean_ids)
    return model.hidden(noisy_ids, t if model.config.time_conditioning else None)


@torch.no_grad()
def rolled_out(
    model: DiT, noisy_ids: Tensor, clean_ids: Tensor, t: Tensor, rollout_index: Tensor, draws: Tensor, sampled: bool
) -> Tensor:
    """The noisy text with the model's own tokens at the rows of the roll-out, int64 ``[B, L]``.

    Args:
        rollout_index: int64 ``[R]`` distinct rows of ``[B * L]``.
        draws: float32 ``[R]``: rows below 0 keep their token; in [0, 1) they choose the token where it is drawn.
        sampled: draw the token from the model's distribution (the paper); else its most probable one (the code).
    """
    hidden = noisy_hidden(model, noisy_ids, clean_ids, t)
    logits = model.logits(hidden.flatten(0, 1)[rollout_index]).float()
    if sampled:
        below = logits.double().softmax(-1).cumsum(-1)
        token = torch.searchsorted(below, (draws.double().clamp(min=0) * below[:, -1])[:, None], right=True)[:, 0]
    else:
        token = logits.argmax(-1)
    flat = noisy_ids.flatten()
    token = torch.where(draws < 0, flat[rollout_index], token)
    return flat.scatter(0, rollout_index, token).view_as(noisy_ids)


def response_losses(
    model: DiT,
    noisy_ids: Tensor,
    clean_ids: Tensor,
    t: Tensor,
    row_index: Tensor,
    weights: Tensor,
    rollout_index: Tensor,
    draws: Tensor,
    *,
    sampled: bool = False,
) -> Tensor:
    """Weighted cross-entropies of a `training.pairs.ResponseBatch`, float32 ``[M]``, nats, after its roll-out."""
    if len(rollout_index):
        noisy_ids = rolled_out(model, noisy_ids, clean_ids, t, rollout_index, draws, sampled)
    hidden = noisy_hidden(model, noisy_ids, clean_ids, t)
    logits = model.logits(hidden.flatten(0, 1)[row_index])
    return F.cross_entropy(logits.float(), clean_ids.flatten()[row_index], reduction="none") * weights
