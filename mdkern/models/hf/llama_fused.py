"""Passes of a model built like Llama in few kernels, with the model's own weights, in place.

Between the matrix products one kernel each is left: the residual addition with the norm, the rotation of queries and
keys with the write to the KV cache, the activation of the MLP, and attention, which reads the cache where it is.
The products are those of `llama_products`, or in e4m3 of `llama_fp8`. The last block runs queries, attention and MLP
at the wanted positions only. Times, and what was tried and left out: docs/notes/llama.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdkern.kernels.backbone.place_heads import place_heads
from mdkern.kernels.backbone.rms_norm import rms_norm
from mdkern.kernels.backbone.window_attention import new_arrivals, runs_window_attention, window_attention
from mdkern.kernels.device import attention_priority, num_sms
from mdkern.models.block_causal import mask_at
from mdkern.models.dit import gather_rows
from mdkern.models.hf.intercept import attend_by, grouped_mask
from mdkern.models.hf.llama_fp8 import Fp8Block, Fp8Products
from mdkern.models.hf.llama_parts import Block, Parts
from mdkern.models.hf.llama_products import Products
from mdkern.models.soft import Soft

LONG = 1024  # keys of which one multiprocessor, which has 64 queries of a head, takes longer than several together


def runs_now() -> bool:
    """Whether the passes may stand in for the model's own: without gradients, autocast and compilers."""
    autocast = torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or autocast)


def run(
    parts: Parts,
    input_ids: Tensor,
    rows: Tensor | None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    kept: Tensor | None = None,
    columns: Tensor | None = None,
    soft: Soft | None = None,
    copies: tuple[Fp8Block, ...] | None = None,
) -> Tensor:
    """The output layer's input at `rows`.

    Args:
        input_ids: int64 ``[B, W]``: whole sequences, or a window of each.
        rows: int64 ``[B, R]`` in 0..W-1, the wanted entries; None: all.
        positions: int64 ``[B, W]``, of the rotary embedding; None: 0..W-1.
        mask: bool, broadcastable to ``[B, H, W, L]``, what the entries see; None: everything.
        kept: ``[layers, 2, B, L + 1, H, head_dim]``, a KV cache, to be read and written; None: W = L.
        columns: int64 ``[B, W]`` in 0..L, where the window's keys and values are kept; None: 0..W-1.
        soft: inputs that are mixtures of tokens and the mask; None: none is.
        copies: the blocks' layers in e4m3, by which the products run; None: the products are those of the model.

    Returns:
        ``[B, R, D]``.
    """
    batch, width = input_ids.shape
    place, columns = (None if index is None else index.flatten() for index in (positions, columns))
    divided = kept is not None and has_few_queries(parts, batch, width, kept.shape[3] - 1, input_ids.device)
    arrived = None
    if kept is not None and columns is not None and mask is None:
        arrived = arrivals_of(parts, batch, width, kept, copies is not None)
    with attention_priority(input_ids.device, divide_keys=divided):
        x = update = normed = None
        groups = len(parts.blocks[0].query.weight) // len(parts.blocks[0].key.weight)
        seen = grouped_mask(mask, groups, parts.embedding.dtype) if arrived is None else None
        fewer = rows is not None and rows.shape[1] < width
        for number, block in enumerate(parts.blocks):
            products = products_of(parts, number, copies)
            if x is not None:
                normed = products.norm(x, block.attn_norm, update)
            elif soft is None:
                x, normed = products.gathered_norm(parts.embedding, input_ids.flatten(), block.attn_norm)
            else:
                x = soft.rows(parts.embedding, input_ids)
                normed = products.norm(x, block.attn_norm)
            pruned = fewer and number + 1 == len(parts.blocks)
            *others, key, value = products.heads(normed, queries=not pruned, keys=True)
            query = None if pruned else others[0]
            cache = None if kept is None else kept[number]
            if arrived is not None and query is not None:
                assert cache is not None
                assert columns is not None
                attended = window_attention(
                    parts.cos, parts.sin, query, key, value, positions=place, columns=columns, kept=cache,
                    arrived=arrived, scale=parts.scale, rounded=products.takes_rounded(normed), **norms_of(block),
                )  # fmt: skip
            else:
                turn(parts, block, query, key, value, place, width, cache, columns)
                if rows is not None and pruned:
                    first = torch.arange(0, batch * width, width, device=rows.device)[:, None]
                    x, normed = products.gathered_norm(x, (first + rows).flatten(), block.attn_norm)
                    (query,) = products.heads(normed, queries=True)
                    wanted = rows if positions is None else positions.gather(1, rows)
                    turn(parts, block, query, None, None, wanted.flatten(), rows.shape[1])
                    seen = grouped_mask(mask_at(mask, rows), groups, parts.embedding.dtype)
                assert query is not None
                attended = attend_rows(query, (key, value) if cache is None else cache, batch, seen, parts.scale)
            normed = products.norm(x, block.mlp_norm, products.attention_update(attended))
            update = products.mlp_update(normed)
        assert x is not None
        states = rms_norm(x, *parts.norm, update=update).unflatten(0, (batch, -1))
        return states if rows is None or fewer else gather_rows(states, rows)


def products_of(parts: Parts, number: int, copies: tuple[Fp8Block, ...] | None) -> Products:
    """The products of one of the blocks."""
    block, head_dim = parts.blocks[number], parts.head_dim
    return Products(block, head_dim) if copies is None else Fp8Products(block, head_dim, copies[number])


def has_few_queries(parts: Parts, batch: int, width: int, length: int, device: torch.device) -> bool:
    """Whether attention of `width` queries over `length` keys would leave multiprocessors idle and take long."""
    heads = len(parts.blocks[0].query.weight) // parts.head_dim
    return length >= LONG and batch * heads * -(-width // 64) <= num_sms(device)


def turn(
    parts: Parts,
    block: Block,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    positions: Tensor | None,
    length: int,
    kept: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """`place_heads` of a block."""
    place_heads(
        parts.cos, parts.sin, query, key, value, positions=positions, length=length, kept=kept, columns=columns,
        **norms_of(block),
    )  # fmt: skip


def norms_of(block: Block) -> dict[str, Any]:
    """The norms of a block's heads, as arguments of `place_heads` and `window_attention`."""
    norms = block.query_norm, block.key_norm
    query_norm, key_norm = (None if norm is None else norm.weight for norm in norms)
    eps = max((norm.eps for norm in norms if norm is not None), default=0.0)
    return {"query_norm": query_norm, "key_norm": key_norm, "eps": eps}


def arrivals_of(parts: Parts, batch: int, width: int, kept: Tensor, fp8: bool) -> Tensor | None:
    """What `window_attention` counts with in a pass over windows; None: other kernels run it."""
    _, _, _, room, heads, head_dim = kept.shape
    groups = len(parts.blocks[0].query.weight) // len(parts.blocks[0].key.weight)
    runs = runs_window_attention(batch, width, heads, groups, room - 1, head_dim, kept.dtype, kept.device, fp8)
    runs = runs and kept.stride(3) % 16 == 0  # else, as with a shifted model's ids beside them, loads are narrow
    return new_arrivals(batch, width, heads, groups, kept.device) if runs else None


def attend_rows(
    query: Tensor, kept: Tensor | tuple[Tensor, Tensor], batch: int, seen: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of rows ``[N, heads, head_dim]`` to keys and values of the same kind, or to a block's cache."""
    pairs = kept[:, :, :-1] if isinstance(kept, Tensor) else [x.unflatten(0, (batch, -1)) for x in kept]
    queries, keys, values = (x.transpose(1, 2) for x in (query.unflatten(0, (batch, -1)), *pairs))
    return attend_by(queries, keys, values, seen, scale).transpose(1, 2).reshape(len(query), -1)
