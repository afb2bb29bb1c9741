"""Launches `soft_embedding`: probabilities of a part of the vocabulary, then their product with its embeddings."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mdkern.kernels.device import copies_in_bulk, num_sms
from mdkern.kernels.head import triton_soft
from mdkern.kernels.head.arguments import Head
from mdkern.kernels.head.launch import Tiling, operands, with_unit_strides

CHUNK_ELEMENTS = 1 << 25  # probabilities in memory at a time
MOST_ROWS = 2048  # rows at a time, so that a chunk has enough ids for fast products
MOST_SPLITS = 8  # parts of a chunk's ids whose products run side by side


def choose_tiling(rows: int, dtype: torch.dtype, bulk_copy: bool, from_logits: bool) -> Tiling:
    """Tiles for at most `rows` rows."""
    if from_logits:
        return Tiling(16, 256, 64, warps=4, stages=2)
    if dtype == torch.float32:
        return Tiling(32, 64, 32, warps=4, stages=2)
    if rows <= 64:
        return Tiling(16 if rows <= 16 else 64, 128, 64, warps=4, stages=4 if bulk_copy else 3)
    if not bulk_copy:
        return Tiling(128, 128, 64, warps=8, stages=3)
    return Tiling(128, 256, 64, warps=8, stages=3, gather=True)


def soft_embedding(
    hidden: Tensor,
    head: Head,
    table: Tensor | None,
    logsumexp: Tensor,
    temperature: Tensor | None,
    uniform_temperature: float,
    tiling: Tiling | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """`mdkern.kernels.soft_embedding` on a GPU (or, on the CPU, in Triton's interpreter)."""
    embedding = head.weight if table is None else table
    assert embedding is not None
    hidden, head = with_unit_strides(hidden, head)
    soft = embedding.new_empty(hidden.shape[0], embedding.shape[1])
    for start in range(0, hidden.shape[0], MOST_ROWS):
        rows = slice(start, start + MOST_ROWS)
        heat = None if temperature is None else temperature[rows].contiguous()
        given = hidden[rows], head, embedding, logsumexp[rows].contiguous(), heat, uniform_temperature
        soft[rows] = embed_rows(*given, tiling, chunk_elements)
    return soft


def embed_rows(
    hidden: Tensor,
    head: Head,
    embedding: Tensor,
    logsumexp: Tensor,
    temperature: Tensor | None,
    uniform_temperature: float,
    tiling: Tiling | None,
    chunk_elements: int,
) -> Tensor:
    """float32 ``[M, E]`` of some rows."""
    rows, vocab = hidden.shape[0], head.vocab(hidden)
    bulk_copy = head.weight is not None and copies_in_bulk(head.weight)
    tiling = tiling or choose_tiling(rows, hidden.dtype, bulk_copy, head.weight is None)
    all_rows = torch.arange(rows, device=hidden.device)
    source, weight, flags = operands(hidden, head, all_rows, tiling, bulk_copy)
    shift = 14 if embedding.dtype == torch.float16 else 0  # probabilities below 2^-24 would be 0 in float16
    splits = choose_splits(rows, embedding)
    unit = splits * tiling.vocab
    width = max(1, min(chunk_elements // rows // unit, triton.cdiv(vocab, unit))) * unit
    weights = embedding.new_empty(rows * width)
    soft = torch.zeros(rows, embedding.shape[1], dtype=torch.float32, device=hidden.device)
    for first in range(0, vocab, width):
        ids = min(width, vocab - first)
        parts = splits if ids == width else 1  # what is left at the end may not divide
        part = width // parts if ids == width else triton.cdiv(ids, tiling.vocab) * tiling.vocab
        tiles = triton.cdiv(ids, tiling.vocab)
        triton_soft.soft_weights_kernel[(triton.cdiv(rows, tiling.rows) * tiles,)](
            source,
            weight,
            head.bias,
            logsumexp,
            temperature,
            uniform_temperature,
            weights,
            first // tiling.vocab,
            tiles,
            rows,
            vocab,
            part,
            hidden.shape[1],
            hidden.stride(0),
            0 if head.weight is None else head.weight.stride(0),
            head.scale,
            head.soft_cap,
            BM=tiling.rows,
            BN=tiling.vocab,
            SHIFT=shift,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **flags,
        )
        probability = weights[: parts * rows * part].view(parts, rows, part)[:, :, : ids // parts]
        soft += product(probability, embedding[first : first + ids])
    return soft.mul_(2.0**-shift) if shift else soft


def choose_splits(rows: int, embedding: Tensor) -> int:
    """Number of parts of the ids with which the second product has enough tiles for the card."""
    tiles = triton.cdiv(rows, 128) * triton.cdiv(embedding.shape[1], 256)
    return max(1, min(MOST_SPLITS, num_sms(embedding.device) // tiles))


def product(probability: Tensor, embedding: Tensor) -> Tensor:
    """``[S, M, n]`` times the S parts of ``[S * n, E]``, summed: float32 ``[M, E]``."""
    parts, _, ids = probability.shape
    if not probability.is_cuda or probability.dtype == torch.float32:
        return torch.bmm(probability.float(), embedding.float().view(parts, ids, -1)).sum(0)
    if parts == 1:
        return torch.mm(probability[0], embedding, out_dtype=torch.float32)
    return torch.bmm(probability, embedding.view(parts, ids, -1), out_dtype=torch.float32).sum(0)
