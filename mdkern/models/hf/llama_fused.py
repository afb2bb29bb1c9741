"""Passes of a model built like Llama in few kernels, with the model's own weights, in place.

Between the matrix products one kernel each is left: the residual addition with the norm, the rotation of queries and
keys with the write to the KV cache, the activation of the MLP, and attention, which reads the cache where it is.
PyTorch runs the products of many rows, `mdkern.kernels.backbone.skinny` those of few rows. The last block runs queries,
attention and MLP at the wanted positions only. Times, and what was tried and left out: docs/notes/llama.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.place_heads import place_heads
from mdkern.kernels.backbone.rms_norm import gathered_rms_norm, rms_norm
from mdkern.kernels.backbone.skinny import runs_skinny, skinny_linear, skinny_parts, skinny_swiglu
from mdkern.kernels.backbone.swiglu import swiglu
from mdkern.kernels.device import num_sms
from mdkern.models.block_causal import mask_at
from mdkern.models.dit import attention_priority, gather_rows
from mdkern.models.hf.intercept import attend
from mdkern.models.hf.llama_experts import run_experts
from mdkern.models.hf.llama_parts import Block, Linear, Parts
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

    Returns:
        ``[B, R, D]``.
    """
    batch, width = input_ids.shape
    place, columns = (None if index is None else index.flatten() for index in (positions, columns))
    divided = kept is not None and has_few_queries(parts, batch, width, kept.shape[3] - 1, input_ids.device)
    with attention_priority(input_ids.device, divide_keys=divided):
        if soft is None:
            x, normed = gathered_rms_norm(parts.embedding, input_ids.flatten(), *parts.blocks[0].attn_norm)
        else:
            x = soft.rows(parts.embedding, input_ids)
            normed = rms_norm(x, *parts.blocks[0].attn_norm)
        update = None
        fewer = rows is not None and rows.shape[1] < width
        for number, block in enumerate(parts.blocks):
            if update is not None:
                normed = rms_norm(x, *block.attn_norm, update=update)
            pruned = fewer and number + 1 == len(parts.blocks)
            layers = block.key, block.value, *(() if pruned else (block.query,))
            key, value, *others = heads_of(normed, layers, parts)
            query = None if pruned else others[0]
            cache = None if kept is None else kept[number]
            turn(parts, block, query, key, value, place, width, cache, columns)
            if rows is not None and pruned:
                first = torch.arange(0, batch * width, width, device=rows.device)[:, None]
                x, normed = gathered_rms_norm(x, (first + rows).flatten(), *block.attn_norm)
                (query,) = heads_of(normed, (block.query,), parts)
                wanted = rows if positions is None else positions.gather(1, rows)
                turn(parts, block, query, None, None, wanted.flatten(), rows.shape[1])
                mask = mask_at(mask, rows)
            assert query is not None
            keys, values = (x.unflatten(0, (batch, -1)) for x in (key, value)) if cache is None else cache[:, :, :-1]
            queries, keys, values = (x.transpose(1, 2) for x in (query.unflatten(0, (batch, -1)), keys, values))
            attended = attend(queries, keys, values, mask, parts.scale).transpose(1, 2).reshape(len(x), -1)
            normed = rms_norm(x, *block.mlp_norm, update=update_by(attended, block.attn_out))
            update = mlp_update(normed, block)
        states = rms_norm(x, *parts.norm, update=update).unflatten(0, (batch, -1))
        return states if rows is None or fewer else gather_rows(states, rows)


def has_few_queries(parts: Parts, batch: int, width: int, length: int, device: torch.device) -> bool:
    """Whether attention of `width` queries over `length` keys would leave multiprocessors idle and take long."""
    heads = len(parts.blocks[0].query.weight) // parts.head_dim
    return length >= LONG and batch * heads * -(-width // 64) <= num_sms(device)


def heads_of(normed: Tensor, layers: Sequence[Linear], parts: Parts) -> list[Tensor]:
    """``[N, heads, head_dim]`` of each of some projections."""
    skinny = runs_skinny(normed, *(layer.weight for layer in layers))
    products = skinny_linear(normed, *layers) if skinny else (F.linear(normed, *layer) for layer in layers)
    return [product.unflatten(1, (-1, parts.head_dim)) for product in products]


def mlp_update(normed: Tensor, block: Block) -> Tensor:
    """The output of the MLP, of the mixture of experts in its place, or of both, as `rms_norm` takes it."""
    mixed = None if block.experts is None else run_experts(normed, block.experts)
    if block.gate is None or block.up is None or block.down is None:
        assert mixed is not None
        return mixed
    gated = activated(normed, block.gate, block.up)
    return update_by(gated, block.down) if mixed is None else mixed.add_(F.linear(gated, *block.down))


def activated(normed: Tensor, gate: Linear, up: Linear) -> Tensor:
    """The input of the last product of the MLP."""
    if runs_skinny(normed, gate.weight, up.weight):
        return skinny_swiglu(normed, gate, up)
    return swiglu(F.linear(normed, *gate), F.linear(normed, *up))


def update_by(x: Tensor, layer: Linear) -> Tensor:
    """A sublayer's output, as `rms_norm` takes it."""
    return skinny_parts(x, *layer) if runs_skinny(x, layer.weight) else F.linear(x, *layer)


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
    norms = block.query_norm, block.key_norm
    query_norm, key_norm = (None if norm is None else norm.weight for norm in norms)
    place_heads(
        parts.cos, parts.sin, query, key, value, positions=positions, length=length, query_norm=query_norm,
        key_norm=key_norm, eps=max((norm.eps for norm in norms if norm is not None), default=0.0), kept=kept,
        columns=columns,
    )  # fmt: skip
