"""Launches `soft_embedding`: logits of a part of the vocabulary, their exponentials, the product with its embeddings.

Both products are cuBLAS's. A kernel of ours with the exponentials in the first product's epilogue was slower, and so
was leaving out ids that cannot matter, except where all rows are sure: docs/notes/diffusion-gemma.md.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mdkern.kernels.device import num_sms
from mdkern.kernels.head.arguments import Head
from mdkern.kernels.head.launch import with_unit_strides
from mdkern.kernels.head.triton_soft import soft_weights_kernel

CHUNK_ELEMENTS = 30 << 20  # logits in memory at a time: 120 MiB, and half as much for their exponentials in 16 bits
MOST_IDS = 1 << 15  # at a time: those of 256 rows stay in the cache of 50 MiB between the products
MOST_ROWS = 2048  # at a time, so that a chunk has enough ids for fast products
MOST_SPLITS = 8  # parts of a chunk's ids whose products run side by side
UNIT = 64  # the ids of a part are a multiple of it
BLOCK = 2048  # logits of a program


def soft_embedding(
    hidden: Tensor,
    head: Head,
    table: Tensor | None,
    logsumexp: Tensor,
    temperature: Tensor | None,
    uniform_temperature: float,
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
        soft[rows] = embed_rows(*given, chunk_elements)
    return soft


def embed_rows(
    hidden: Tensor,
    head: Head,
    embedding: Tensor,
    logsumexp: Tensor,
    temperature: Tensor | None,
    uniform_temperature: float,
    chunk_elements: int,
) -> Tensor:
    """float32 ``[M, E]`` of some rows."""
    rows, vocab = hidden.shape[0], head.vocab(hidden)
    shift = 14 if embedding.dtype == torch.float16 else 0  # probabilities below 2^-24 would be 0 in float16
    splits = choose_splits(rows, embedding)
    unit = splits * UNIT
    chunks = max(1, triton.cdiv(vocab, max(1, min(chunk_elements // rows, MOST_IDS))))
    width = triton.cdiv(triton.cdiv(vocab, chunks), unit) * unit or unit  # as equal as units allow
    probability = embedding.new_empty(rows, width)
    soft = torch.zeros(rows, embedding.shape[1], dtype=torch.float32, device=hidden.device)
    for first in range(0, vocab, width):
        part = slice(first, min(first + width, vocab))
        ids = part.stop - first
        logits = hidden[:, part]
        if head.weight is not None:
            logits = product(hidden[None], head.weight[part].to(hidden.dtype).T[None])
        soft_weights_kernel[(rows, triton.cdiv(ids, BLOCK))](
            logits,
            None if head.weight_scale is None else head.weight_scale[part],
            None if head.bias is None else head.bias[part],
            logsumexp,
            temperature,
            uniform_temperature,
            probability,
            ids,
            logits.stride(0),
            width,
            head.scale,
            head.soft_cap,
            BLOCK=BLOCK,
            SHIFT=shift,
            HAS_SCALE=head.scale != 1.0,
            HAS_CAP=head.soft_cap != 0.0,
            num_warps=4,
        )
        parts = splits if ids == width else 1  # what is left at the end may not divide
        divided = probability[:, :ids].view(rows, parts, ids // parts).transpose(0, 1)
        soft += product(divided, embedding[part].view(parts, ids // parts, -1))
    return soft.mul_(2.0**-shift) if shift else soft


def choose_splits(rows: int, embedding: Tensor) -> int:
    """Number of parts of the ids with which the second product has enough tiles for the card."""
    tiles = triton.cdiv(rows, 128) * triton.cdiv(embedding.shape[1], 256)
    return max(1, min(MOST_SPLITS, num_sms(embedding.device) // tiles))


def product(left: Tensor, right: Tensor) -> Tensor:
    """``[S, M, K]`` times ``[S, K, N]``, summed over S: float32 ``[M, N]``."""
    if not left.is_cuda or left.dtype == torch.float32:
        return torch.bmm(left.float(), right.float()).sum(0)
    if len(left) == 1:
        return torch.mm(left[0], right[0], out_dtype=torch.float32)
    return torch.bmm(left, right, out_dtype=torch.float32).sum(0)
