"""Attention of block-causal models (BD3-LM, Arriola et al., 2503.09573): masks, and the pass that trains them.

The blocks of a text are counted from its first token: column i is in block ``i // block_length``. A block sees itself,
in both directions, and the blocks before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mdkern.models.dit import DiT


def block_mask(length: int, block_length: int, device: torch.device | str | None = None) -> Tensor:
    """What each position of a text sees, bool ``[L, L]`` (query, key): the blocks up to its own."""
    block = torch.arange(length, device=device) // block_length
    return block[:, None] >= block


def paired_mask(length: int, block_length: int, device: torch.device | str | None = None) -> Tensor:
    """What each column sees of a noisy text followed by the clean one, bool ``[2 L, 2 L]`` (query, key).

    A noisy position sees its own block of the noisy text and the earlier blocks of the clean one; a clean position
    sees the blocks of the clean text up to its own.
    """
    block = torch.arange(length, device=device) // block_length
    same, earlier = block[:, None] == block, block[:, None] > block
    return torch.cat((torch.cat((same, earlier), 1), torch.cat((torch.zeros_like(same), same | earlier), 1)))


def with_padding(mask: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """A mask of attention, bool and broadcastable to ``[B, H, Q, K]``; None: everything is seen.

    Args:
        mask: bool ``[Q, K]``, what each position sees; None: everything.
        attention_mask: bool ``[B, K]``, False at padding; None: no padding. With a `mask`, Q = K, and every column sees
            itself, also padding: a row without anything to attend to would be NaN, which spreads to later layers.
    """
    seen = None if attention_mask is None else attention_mask[:, None, None, :]
    if mask is None:
        return seen
    return mask if seen is None else (mask & seen) | torch.eye(len(mask), dtype=torch.bool, device=mask.device)


def window_mask(columns: Tensor, length: int, block_length: int, attention_mask: Tensor | None) -> Tensor:
    """What the columns of a window see of texts of L columns: the blocks up to their own, bool ``[B, 1, W, L]``.

    Args:
        columns: int64 ``[B, W]`` in 0..L; what L sees is of no use.
        attention_mask: bool ``[B, L]``, False at padding, which nothing but itself sees; None: no padding.
    """
    column = torch.arange(length, device=columns.device)
    own = columns[:, None, :, None]
    seen = column < (own // block_length + 1) * block_length
    return seen if attention_mask is None else (seen & attention_mask[:, None, None, :]) | (column == own)


def mask_at(mask: Tensor | None, positions: Tensor) -> Tensor | None:
    """A mask of `with_padding` or `window_mask` at queries ``positions [B, R]``, broadcastable to ``[B, H, R, K]``."""
    if mask is None or mask.shape[-2] == 1:
        return mask
    if mask.ndim == 2:
        return mask[positions][:, None]
    return mask.gather(2, positions[:, None, :, None].expand(-1, -1, -1, mask.shape[-1]))


def paired_hidden(model: DiT, noisy_ids: Tensor, clean_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Hidden states of a noisy text whose every block sees the clean blocks before it, ``[B, L, D]``.

    They are what a pass over [clean blocks before, noisy block] gives for that block, for all blocks from one pass over
    both texts.

    Args:
        model: a `DiT` with ``config.block_causal``.
        noisy_ids, clean_ids: int64 ``[B, L]``.
        attention_mask: bool ``[B, L]``, False at padding; None: no padding.
    """
    length, device = noisy_ids.shape[1], noisy_ids.device
    assert model.config.block_causal is not None
    column = torch.arange(length, device=device)
    return model.plain_hidden(
        torch.cat((noisy_ids, clean_ids), 1),
        positions=column.expand_as(noisy_ids),
        attention_mask=None if attention_mask is None else attention_mask.repeat(1, 2),
        attn_mask=paired_mask(length, model.config.block_causal, device),
        position=column.repeat(2),
    )
