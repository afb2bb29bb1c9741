"""A `DiT` over a window of its sequences, with a KV cache of earlier passes for the rest.

Decoding in blocks with a cache runs this (Fast-dLLM, Wu et al., 2505.22618). Where attention is bidirectional, keys and
values of a column change when any other column does. The cached ones are then out of date, and the result equals that
of a full pass only if nothing else has changed since, or if only keys and values of the first block are read, because
those depend on their own column alone. Those of a block-causal model stay right once their block is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.linear import linear_gelu, linear_rotary
from mdkern.kernels.backbone.modulated_norm import gathered_norm, modulated_norm
from mdkern.kernels.backbone.rotary import rotary as rotate
from mdkern.kernels.device import attention_priority
from mdkern.models import dit_fused
from mdkern.models.block_causal import mask_at, window_mask, with_padding
from mdkern.models.dit import Block, DiT, DiTConfig, gather_rows
from mdkern.models.dit_fp8 import QuantisedBlock
from mdkern.models.dit_fused import (
    FoldedBlock,
    Stream,
    add_quantised,
    attend,
    modulation,
    quantised_qkv,
    queries_at,
    soft_rows,
)
from mdkern.models.soft import soften


def cache_shape(config: DiTConfig, batch: int, length: int) -> tuple[int, ...]:
    """``[blocks, 2, B, L + 1, H, head_dim]``: rotated keys, and values, of each block; column L is scratch."""
    return config.num_blocks, 2, batch, length + 1, config.num_heads, config.width // config.num_heads


def window_hidden(
    model: DiT,
    cache: Tensor,
    input_ids: Tensor,
    columns: Tensor | None,
    positions: Tensor,
    t: Tensor | None = None,
    attention_mask: Tensor | None = None,
    weight: Tensor | None = None,
    folds: dit_fused.Folds | None = None,
) -> Tensor:
    """`Denoiser.window_hidden` of a `DiT`: ``[B, R, D]`` at ``positions [B, R]`` of the window ``[B, W]``.

    The last block computes queries, attention and MLP at the wanted rows only, as in `DiT.hidden`. Of `folds` only the
    layers in e4m3 are used.
    """
    run: Callable[..., Tensor]
    if folds is not None and folds.precision == "fp8" and dit_fused.pays(input_ids.numel(), input_ids):
        run = partial(fused_window_hidden, quantised=folds.blocks)
    else:
        run = fused_window_hidden if dit_fused.covers(model) else plain_window_hidden
    mask, blocks = with_padding(None, attention_mask), model.config.block_causal
    if blocks is not None:
        places = all_columns(input_ids) if columns is None else columns
        mask = window_mask(places, cache.shape[3] - 1, blocks, attention_mask)
    with attention_priority(input_ids.device):
        return run(model, cache, input_ids, columns, positions, model.condition(t), mask, weight)


def all_columns(input_ids: Tensor) -> Tensor:
    """0..L-1 for each sequence of ``[B, L]``."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def plain_window_hidden(
    model: DiT,
    cache: Tensor,
    input_ids: Tensor,
    columns: Tensor | None,
    positions: Tensor,
    condition: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None = None,
) -> Tensor:
    """`window_hidden` by calling the modules, like `DiT.plain_hidden`."""
    if columns is None:
        columns = all_columns(input_ids)
    inside = columns.clamp(max=cache.shape[3] - 2)
    rotary, wanted_rotary = rotary_at(model, inside), rotary_at(model, inside.gather(1, positions))
    x = soften(model.embedding[input_ids], model.embedding[model.config.mask_id], weight, positions)
    *blocks, last = cast(Iterable[Block], model.blocks)
    for block, cached in zip(blocks, cache):
        x = run_block(block, x, cached, columns, rotary, condition, mask)
    x = run_block(last, x, cache[-1], columns, rotary, condition, mask, positions, wanted_rotary)
    return model.norm_final(x, *model.modulation_final(condition))


def rotary_at(model: DiT, columns: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of ``columns [B, W]``, float32 ``[B, 1, W, head_dim / 2]``."""
    cos, sin = model.rotary
    return cos[columns][:, None], sin[columns][:, None]


def run_block(
    block: Block,
    x: Tensor,
    cached: Tensor,
    columns: Tensor,
    rotary: tuple[Tensor, Tensor],
    condition: Tensor | None,
    mask: Tensor | None,
    positions: Tensor | None = None,
    wanted_rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`Block.forward` of a window ``[B, W, D]``, which writes to ``cached [2, B, L + 1, H, head_dim]``."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition)
    normed = block.norm1(x, shift1, scale1)
    query, key, value = block.heads(normed, rotary, positions, wanted_rotary)
    if positions is not None:
        x, mask = gather_rows(x, positions), mask_at(mask, positions)
    sequence = torch.arange(len(columns), device=columns.device)[:, None]
    for old, new in zip(cached, (key, value)):
        old[sequence, columns] = new.transpose(1, 2)
    keys, values = cached[:, :, :-1].transpose(2, 3)
    attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return block.finish(x, attended, gate1, shift2, scale2, gate2)


def fused_window_hidden(
    model: DiT,
    cache: Tensor,
    input_ids: Tensor,
    columns: Tensor | None,
    positions: Tensor,
    condition: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None = None,
    quantised: Sequence[FoldedBlock | QuantisedBlock] | None = None,
) -> Tensor:
    """`window_hidden` in fewer passes over memory, like `dit_fused.hidden`; with the blocks `quantised` in e4m3."""
    (batch, width), room = input_ids.shape, cache.shape[3]
    first = torch.arange(batch, device=input_ids.device)[:, None]
    wanted = (first * width + positions).flatten()  # [B * R], rows of the window
    inside = None if columns is None else columns.clamp(max=room - 2)
    wanted_columns = positions if inside is None else inside.gather(1, positions)
    place = None if columns is None else (first * room + columns).flatten()  # [B * W], rows of a block's cache
    stream = None
    blocks = cast("list[Block]", list(model.blocks))
    for number, (block, cached) in enumerate(zip(blocks, cache)):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block.modulation, condition)
        last = number + 1 == len(blocks)
        kinds = 2 if last else 3
        folded = None if quantised is None else quantised[number]
        if stream is None:
            if weight is None:
                x, normed = gathered_norm(model.embedding, input_ids.flatten(), block.norm1.weight, shift1, scale1)
            else:
                x = soft_rows(model, input_ids, weight, positions)
                normed = modulated_norm(x, block.norm1.weight, shift1, scale1)
            stream = Stream(x)
            qkv = window_qkv(block, normed, kinds, model.rotary, batch, inside)
        elif isinstance(folded, QuantisedBlock):
            rotated = kinds - 1 if inside is None else 0
            qkv = quantised_qkv(model, stream, folded, kinds, rotated, width)
            qkv = placed(qkv, block, kinds, model.rotary, batch, inside)
        else:
            normed = stream.norm(block.norm1.weight, shift1, scale1)
            qkv = window_qkv(block, normed, kinds, model.rotary, batch, inside)
        write_cache(cached, qkv[:, :, -2:], place)
        if last:
            x, normed = gathered_norm(stream.x, wanted, block.norm1.weight, shift1, scale1)
            stream, query = Stream(x), queries_at(block, normed, wanted_columns, model.rotary)
            mask = mask_at(mask, positions)
        else:
            query = qkv[:, :, 0]
        keys, values = cached[:, :, :-1]
        attended = attend(query, keys, values, mask).view(stream.x.shape)
        if isinstance(folded, QuantisedBlock) and not last:
            add_quantised(stream, attended, block, gate1, folded)
            continue
        stream.add(attended, block.attn_out, gate1)
        normed = stream.norm(block.norm2.weight, shift2, scale2)
        stream.add(linear_gelu(normed, block.mlp_up.weight, block.mlp_up.bias), block.mlp_down, gate2)
    assert stream is not None
    final = stream.norm(model.norm_final.weight, *modulation(model.modulation_final, condition))
    return final.unflatten(0, (batch, -1))


def window_qkv(
    block: Block, normed: Tensor, kinds: int, tables: tuple[Tensor, Tensor], batch: int, columns: Tensor | None
) -> Tensor:
    """The last `kinds` of queries, keys and values of a window; queries and keys are rotated.

    Args:
        normed: ``[B * W, D]``.
        columns: int64 ``[B, W]``; None: 0..W-1.

    Returns:
        ``[B, W, kinds, H, head_dim]``.
    """
    weight = block.attn_qkv.weight[-kinds * normed.shape[1] :]
    if columns is None:
        heads = (kinds - 1) * block.num_heads
        product = linear_rotary(normed, weight, *tables, heads=heads, length=len(normed) // batch)
    else:
        product = F.linear(normed, weight)
    return placed(product, block, kinds, tables, batch, columns)


def placed(
    product: Tensor, block: Block, kinds: int, tables: tuple[Tensor, Tensor], batch: int, columns: Tensor | None
) -> Tensor:
    """A product ``[B * W, kinds * D]`` as `window_qkv` returns it, rotated here if the window is not all columns."""
    heads = product.view(batch, -1, kinds, block.num_heads, 2 * tables[0].shape[1])
    if columns is not None:
        rotate(
            heads.flatten(0, 1).flatten(1, 2)[:, : (kinds - 1) * block.num_heads], *tables, positions=columns.flatten()
        )
    return heads


def write_cache(cached: Tensor, heads: Tensor, place: Tensor | None) -> None:
    """Write keys and values ``[B, W, 2, H, head_dim]`` into a block's ``cached [2, B, L + 1, H, head_dim]``.

    `place`, int64 ``[B * W]``, is the row of each among ``B * (L + 1)``; None: the first L of each sequence.
    """
    if place is None:
        cached[:, :, :-1] = heads.permute(2, 0, 1, 3, 4)
    else:
        cached.flatten(1, 2).index_copy_(1, place, heads.flatten(0, 1).transpose(0, 1))
