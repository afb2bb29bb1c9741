"""Runs a model's own forward pass, but replaces its output layer and its attention, without changing the model.

The pass runs under a `TorchFunctionMode`, which sees all calls of PyTorch's functions in its thread. The output layer,
recognised by its weight, hands over its input instead of computing logits. Attention may be replaced, either to mask
padding, or to run a window of the sequences over cached keys and values. The model's modules, weights and hooks are not
changed, so several passes, threads and CUDA graphs may use the model at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mdkern.kernels.invariant import is_batch_invariant
from mdkern.models.soft import Soft, soften

ID_ROOM = 8  # numbers of any floating dtype that hold one id, an int32, and keep rows aligned


class AttentionCall(NamedTuple):
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor  # [B, Hq, W, head_dim]
    key: Tensor  # [B, H, L, head_dim]
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class HeadPass(TorchFunctionMode):
    """Keeps the input of the linear layer with this `weight`, and makes the layer return a result without columns.

    It does not raise an exception, because that would skip hooks that undo something, and does not return the input
    itself, because models scale the result in place.
    """

    def __init__(
        self,
        weight: Tensor,
        attention: Callable[[AttentionCall], Tensor] | None = None,
        inputs: SoftInputs | WatchedInputs | None = None,
        told_mask: Tensor | None = None,
    ) -> None:
        """
        Args:
            attention: replaces `scaled_dot_product_attention`.
            inputs: is given the results of `embedding`.
            told_mask: a mask that the model's call is given, and that hides something. SDAR asks whether it does, which
                would wait for the device.
        """
        super().__init__()
        self.weight, self.attention, self.inputs, self.told_mask = weight, attention, inputs, told_mask
        self.calls = 0
        self.hidden: Tensor | None = None
        self.bias: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.attention is not None:
            return self.attention(AttentionCall(*args, **kwargs))
        if func in (torch.all, Tensor.all) and len(args) == 1 and args[0] is self.told_mask:
            return torch.tensor(False)
        if func is F.linear:
            hidden, weight, bias = linear_arguments(*args, **kwargs)
            if weight is self.weight:
                self.calls += 1
                self.hidden, self.bias = hidden, bias
                return hidden.new_empty((*hidden.shape[:-1], 0))
        if func is F.embedding and self.inputs is not None:
            return self.inputs(*embedding_arguments(*args, **kwargs), func(*args, **kwargs))
        return func(*args, **kwargs)


def linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def embedding_arguments(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return input, weight


class WatchedInputs:
    """Leaves embeddings as they are, and records the tables in which the ids of a pass are looked up."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids
        self.tables: list[Tensor] = []

    def __call__(self, ids: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        if ids.shape == self.input_ids.shape and ids.equal(self.input_ids):
            self.tables.append(table)
        return rows


class SoftInputs:
    """Mixes what is looked up in the input embedding with the mask's row, see `mdkern.models.soft`."""

    def __init__(self, table: Tensor, soft: Soft) -> None:
        self.table, self.soft = table, soft
        self.calls = 0

    def __call__(self, ids: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        if table is not self.table:
            return rows
        self.calls += 1
        mask = F.embedding(ids.new_full((1,), self.soft.mask_id), table)[0]
        return soften(rows, mask, self.soft.weight, self.soft.positions)


class Layout(NamedTuple):
    """The layout of a KV cache: rotated keys, and values, of every layer. It is a tuple so that graphs compare it."""

    layers: int
    heads: int  # number of heads of keys and values
    head_dim: int

    def shape(self, batch: int, length: int, extra: int = 0) -> tuple[int, ...]:
        """``[layers, 2, B, L + 1, H * head_dim + extra]``; column L is scratch."""
        return self.layers, 2, batch, length + 1, self.heads * self.head_dim + extra

    def heads_of(self, cache: Tensor) -> Tensor:
        """``[layers, 2, B, L + 1, H, head_dim]`` of a cache of `shape`."""
        return cache[..., : self.heads * self.head_dim].unflatten(-1, (self.heads, self.head_dim))


def kept_ids(cache: Tensor) -> Tensor:
    """int32 ``[B, L + 1]``: the columns' ids, which are stored in `ID_ROOM` extra numbers of the first layer's keys."""
    return cache[0, 0, :, :, -ID_ROOM:].view(torch.int32)[:, :, 0]


class WatchedAttention:
    """Leaves attention as it is, and records what its calls tell in one pass over whole sequences."""

    def __init__(self, kv_heads: int | None, replaced: bool = False) -> None:
        """
        Args:
            kv_heads: number of distinct heads of keys and values, if they may be repeated.
            replaced: whether masks of the model will not be used.
        """
        self.kv_heads, self.replaced = kv_heads, replaced
        self.seen: list[tuple[int, int]] = []  # heads and head_dim of each call
        self.reason = ""  # why keys and values can't be cached
        self.masked = False  # whether a call had a mask, though it may hide nothing

    def __call__(self, call: AttentionCall) -> Tensor:
        self.reason = self.reason or objection(call, self.replaced)
        self.masked = self.masked or call.attn_mask is not None
        heads, own = call.key.shape[1], self.kv_heads
        groups = call.key.unflatten(1, (own if own and heads % own == 0 else heads, -1))
        repeated = bool((groups == groups[:, :, :1]).all())  # to the number of query heads
        self.seen.append((groups.shape[1] if repeated else heads, call.key.shape[3]))
        if self.replaced:  # the model's own mask may hide everything of a row
            return attend(call.query, call.key, call.value, None, call.scale)
        return F.scaled_dot_product_attention(**call._asdict())

    def layout(self) -> Layout | str:
        """The layout of a cache, or the reason why keys and values can't be cached."""
        if not self.seen:
            return "its attention is not PyTorch's scaled_dot_product_attention (attn_implementation='sdpa')"
        if self.reason:
            return self.reason
        if len(set(self.seen)) > 1:
            return "its layers' keys and values differ in their shapes"
        return Layout(len(self.seen), *self.seen[0])


def objection(call: AttentionCall, replaced: bool) -> str:
    """Why the keys and values of a call over whole sequences can't be cached; "" if they can.

    `replaced`: whether its mask will not be used.
    """
    if call.is_causal and not replaced:
        return "its attention looks to the left only"
    if call.query.shape[2] != call.key.shape[2] or call.key.shape != call.value.shape:
        return "its keys, values and queries differ in their shapes"
    mask = call.attn_mask
    if mask is None or replaced:
        return ""
    open_to_all = mask.all() if mask.dtype == torch.bool else (mask == 0).all()
    return "" if bool(open_to_all) else "its attention has a mask or a bias of its own"


def whole_attention(mask: Tensor | None) -> Callable[[AttentionCall], Tensor]:
    """Attention over whole sequences with this mask, whatever mask the model makes.

    It replaces the model's mask also if it is None: while a graph is captured, some versions of transformers make a
    mask that hides nothing (`is_tracing` in their masking_utils), with which faster kernels cannot be used. The mask is
    bool and broadcastable to ``[B, H, L, L]``; None: everything is seen.
    """
    return lambda call: attend(call.query, call.key, call.value, mask, call.scale)


class KeptAttention:
    """Attention of a window's queries over all columns, which puts the window's keys and values into the cache.

    An object serves one pass, whose calls are the layers in order.
    """

    def __init__(
        self, layout: Layout, cache: Tensor, columns: Tensor | None, mask: Tensor | None, turn: Turn | None
    ) -> None:
        """
        Args:
            cache: a tensor of `Layout.shape`.
            columns: int64 ``[B, W]`` in 0..L, the columns of the window; None: W = L, all columns.
            mask: bool, broadcastable to ``[B, H, W, L]``; None: everything is seen.
            turn: corrects the positions of the window, for models that count them from 0.
        """
        self.kept, self.columns, self.turn = layout.heads_of(cache), columns, turn
        self.mask = mask
        self.sequence = torch.arange(cache.shape[2], device=cache.device)[:, None]
        self.layer = 0

    def __call__(self, call: AttentionCall) -> Tensor:
        query, key = call.query, call.key
        if self.turn is not None:
            query, key = self.turn(query), self.turn(key)
        kept = self.kept[self.layer]  # [2, B, L + 1, H, head_dim]
        self.layer += 1
        for old, new in zip(kept, (key, call.value)):
            once = new[:, :: new.shape[1] // kept.shape[3]].transpose(1, 2).to(old.dtype)  # [B, W, H, head_dim]
            if self.columns is None:
                old[:, :-1] = once
            else:
                old[self.sequence, self.columns] = once
        keys, values = kept[:, :, :-1].transpose(2, 3).to(query.dtype)
        return attend(query, keys, values, self.mask, call.scale)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """``[B, Hq, W, head_dim]`` over ``[B, H, L, head_dim]``, H a divisor of Hq.

    The mask is bool and broadcastable to ``[B, H, W, L]``; None: everything is seen.
    """
    return attend_by(query, key, value, grouped_mask(mask, query.shape[1] // key.shape[1], query.dtype), scale)


def grouped_mask(mask: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor | None:
    """A mask of `attend` as `attend_by` takes it in all layers: what is added, with a row for each query of a group.

    PyTorch would make that of a bool mask in every layer. In the batch-invariant mode it stays bool.
    """
    if mask is None:
        return None
    if groups > 1 and mask.shape[-2] > 1:
        mask = mask.repeat(*([1] * (mask.ndim - 2)), groups, 1)
    if is_batch_invariant():
        return mask
    columns = mask.shape[-1]
    added = torch.empty((*mask.shape[:-1], -(-columns // 8) * 8), dtype=dtype, device=mask.device)  # rows are aligned
    return added[..., :columns].fill_(-torch.inf).masked_fill_(mask, 0.0)


def attend_by(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`attend` with a mask of `grouped_mask`."""
    (_, queries, width, _), heads = query.shape, key.shape[1]
    if queries == heads or mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=queries > heads
        )
    # PyTorch has no fast kernel for grouped queries with a mask. They are put one after the other.
    groups = queries // heads
    grouped = query.unflatten(1, (heads, groups)).flatten(2, 3)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return attended.unflatten(2, (groups, width)).flatten(1, 2)


class Turn:
    """Moves rotary positions: queries and keys that were rotated for position i become those of another column.

    Rotations add up, so this corrects models that count a window's positions from 0. It rounds a second time.
    """

    def __init__(self, rotary: Callable[[Tensor, Tensor], Any], length: int, head_dim: int, columns: Tensor) -> None:
        """`rotary` rotates queries and keys ``[1, 1, L, head_dim]`` by their index; ``columns [B, W]`` in 0..L-1."""
        half = head_dim // 2
        unit = torch.zeros(1, 1, length, head_dim, device=columns.device)
        unit[..., :half] = 1.0
        turned = rotary(unit, unit)[0][0, 0]  # [L, head_dim]: cosines in the first half, sines in the second
        by = columns - torch.arange(columns.shape[1], device=columns.device)
        self.cos = turned[:, :half][by.abs()][:, None]  # [B, 1, W, head_dim / 2]
        self.sin = (turned[:, half:][by.abs()] * by.sign()[..., None])[:, None]

    def __call__(self, heads: Tensor) -> Tensor:
        """``[B, H, W, head_dim]``."""
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)
        return turned.to(heads.dtype)
