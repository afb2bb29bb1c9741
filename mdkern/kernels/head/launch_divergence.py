"""Launches the kernels of `divergence`: chooses tiles, splits the vocabulary to fill the card, and runs two kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from mdkern.kernels.device import copies_in_bulk, num_sms
from mdkern.kernels.head import triton_divergence as kernels
from mdkern.kernels.head.arguments import Head
from mdkern.kernels.head.launch import Tiling, operands, with_unit_strides

PARTS = kernels.PARTS.value
MOST_SPLITS = 512  # most parts of the vocabulary, which the second kernel reads for each row


def choose_tiling(rows: int, heads: tuple[tuple[Tensor, Head], ...], bulk_copy: bool) -> Tiling:
    """Tiles for `rows` rows. Times: docs/notes/output-layer.md."""
    if any(hidden.dtype == torch.float32 for hidden, head in heads if head.weight is not None):
        return Tiling(32, 64, 32, warps=4, stages=2, programs_per_sm=2)
    if rows <= 16:
        return Tiling(16, 128, 128 if bulk_copy else 64, warps=4, stages=3, programs_per_sm=2)
    return Tiling(64, 128, 64, warps=4, stages=3, programs_per_sm=2, gather=rows > 256)


def divergence(
    hidden: Tensor,
    head: Head,
    other_hidden: Tensor,
    other: Head,
    row_index: Tensor,
    tiling: Tiling | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.divergence` on a GPU (or, on the CPU, in Triton's interpreter)."""
    heads = with_unit_strides(hidden, head), with_unit_strides(other_hidden, other)
    device, count, vocab = hidden.device, row_index.shape[0], head.vocab(hidden)
    kl = torch.empty(count, dtype=torch.float32, device=device)
    cross_entropy = torch.empty_like(kl)
    if count == 0:
        return kl, cross_entropy
    row_index = row_index.contiguous()
    tiling = tiling or choose_tiling(count, heads, all(reads_in_bulk(head) for _, head in heads))
    row_tiles, vocab_tiles = triton.cdiv(count, tiling.rows), triton.cdiv(vocab, tiling.vocab)
    programs = programs or num_sms(device) * tiling.programs_per_sm
    chunk = triton.cdiv(vocab_tiles, min(vocab_tiles, splits_for(row_tiles, programs)))
    splits = triton.cdiv(vocab_tiles, chunk)
    parts = torch.empty((splits, PARTS, count), dtype=torch.float32, device=device)
    (first, flags), (second, other_flags) = (arguments(*pair, row_index, tiling) for pair in heads)
    kernels.divergence_kernel[(row_tiles * splits,)](
        *first,
        *second,
        row_index,
        parts,
        count,
        vocab,
        hidden.shape[0],
        chunk,
        BM=tiling.rows,
        BN=tiling.vocab,
        EXCLUDES=heads[1][1].bias is not None or heads[1][1].weight is None,  # q may be 0 at some ids
        **flags,
        **{f"OTHER_{name}": value for name, value in other_flags.items()},
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    rows_at_once, split_block = (1, MOST_SPLITS) if splits > 32 else (8, 32)
    kernels.divergence_reduce_kernel[(triton.cdiv(count, rows_at_once),)](
        parts, kl, cross_entropy, count, splits, ROWS=rows_at_once, SPLITS=split_block, num_warps=2
    )
    return kl, cross_entropy


def splits_for(row_tiles: int, programs: int) -> int:
    """The number of parts of the vocabulary with which the last wave of programs is nearly full."""
    if 8 * row_tiles <= programs:
        return min(programs // row_tiles, MOST_SPLITS)

    def fullness(splits: int) -> float:
        waves = row_tiles * splits / programs
        return waves / math.ceil(waves) - 0.01 * splits

    return max(range(1, 9), key=fullness)


def reads_in_bulk(head: Head) -> bool:
    return head.weight is not None and copies_in_bulk(head.weight)


def arguments(hidden: Tensor, head: Head, row_index: Tensor, tiling: Tiling) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's arguments and constants for one head."""
    source, table, flags = operands(hidden, head, row_index, tiling, reads_in_bulk(head))
    strides = (hidden.stride(0), 0 if head.weight is None else head.weight.stride(0))
    return (source, table, head.weight_scale, head.bias, hidden.shape[1], *strides, head.scale, head.soft_cap), flags
