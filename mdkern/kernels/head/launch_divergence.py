"""Launches `divergence`'s kernels: chooses tiles, splits the vocabulary so that the card is full, runs two kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mdkern.kernels.device import copies_in_bulk, num_sms
from mdkern.kernels.head import triton_divergence as kernels

PARTS = kernels.PARTS.value
MOST_SPLITS = 512  # of the vocabulary: what the second kernel reads of a row


@dataclass(frozen=True)
class Tiles:
    """How both products are cut. With `gather` the rows are copied together first, for bulk copies to serve."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    per_processor: int = 1  # programs resident on a multiprocessor at a time
    gather: bool = False


@dataclass(frozen=True)
class Head:
    hidden: Tensor  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    soft_cap: float

    @property
    def columns(self) -> int:
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    def excludes(self) -> bool:
        """Whether an id may be impossible."""
        return self.bias is not None or self.weight is None


def choose_tiles(rows: int, heads: tuple[Head, Head], bulk_copy: bool) -> Tiles:
    """Tiles for `rows` rows.

    On an H100 at D = 768 and 512, V = 50,258 and 4,096 rows 64 x 128 took 1.33 ms with the rows gathered first and 1.39
    without, 128 x 128 took 1.90.
    """
    if any(head.hidden.dtype == torch.float32 for head in heads if head.weight is not None):
        return Tiles(32, 64, 32, warps=4, stages=2, per_processor=2)
    if rows <= 16:
        return Tiles(16, 128, 128 if bulk_copy else 64, warps=4, stages=3, per_processor=2)
    return Tiles(64, 128, 64, warps=4, stages=3, per_processor=2, gather=rows > 256)


def divergence(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    soft_cap: float,
    other_hidden: Tensor,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    other_scale: float,
    other_soft_cap: float,
    row_index: Tensor,
    tiles: Tiles | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`mdkern.kernels.divergence` on a GPU (or, on the CPU, in Triton's interpreter)."""
    heads = (
        whole(Head(hidden, weight, bias, scale, soft_cap)),
        whole(Head(other_hidden, other_weight, other_bias, other_scale, other_soft_cap)),
    )
    device, count, columns = hidden.device, row_index.shape[0], heads[0].columns
    kl = torch.empty(count, dtype=torch.float32, device=device)
    cross_entropy = torch.empty_like(kl)
    if count == 0:
        return kl, cross_entropy
    row_index = row_index.contiguous()
    bulk_copy = all(head.weight is not None and copies_in_bulk(head.weight) for head in heads)
    tiles = tiles or choose_tiles(count, heads, bulk_copy)
    row_tiles, vocab_tiles = triton.cdiv(count, tiles.rows), triton.cdiv(columns, tiles.columns)
    programs = programs or num_sms(device) * tiles.per_processor
    chunk = triton.cdiv(vocab_tiles, min(vocab_tiles, splits_for(row_tiles, programs)))
    splits = triton.cdiv(vocab_tiles, chunk)
    parts = torch.empty((splits, PARTS, count), dtype=torch.float32, device=device)
    (first, flags), (second, other_flags) = (arguments(head, row_index, tiles) for head in heads)
    kernels.divergence_kernel[(row_tiles * splits,)](
        *first,
        *second,
        row_index,
        parts,
        count,
        columns,
        chunk,
        BM=tiles.rows,
        BN=tiles.columns,
        EXCLUDES=heads[1].excludes(),
        **flags,
        **{f"OTHER_{name}": value for name, value in other_flags.items()},
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    rows_at_once, split_block = (1, MOST_SPLITS) if splits > 32 else (8, 32)
    kernels.divergence_reduce_kernel[(triton.cdiv(count, rows_at_once),)](
        parts, kl, cross_entropy, count, splits, ROWS=rows_at_once, SPLITS=split_block, num_warps=2
    )
    return kl, cross_entropy


def splits_for(row_tiles: int, programs: int) -> int:
    """Into how many parts the vocabulary is cut, such that the last of the waves of programs is nearly full."""
    if 8 * row_tiles <= programs:
        return min(programs // row_tiles, MOST_SPLITS)

    def fullness(splits: int) -> float:
        waves = row_tiles * splits / programs
        return waves / math.ceil(waves) - 0.01 * splits

    return max(range(1, 9), key=fullness)


def whole(head: Head) -> Head:
    """The same with what the kernels need contiguous."""
    weight, hidden = head.weight, head.hidden
    if weight is not None and weight.stride(1) != 1:
        raise ValueError(f"weight must have unit stride along its rows, not strides {weight.stride()}")
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    return Head(hidden, weight, None if head.bias is None else head.bias.contiguous(), head.scale, head.soft_cap)


def arguments(head: Head, row_index: Tensor, tiles: Tiles) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of one head: the kernel's arguments and its flags."""
    hidden, weight = head.hidden, head.weight
    depth = hidden.shape[1]
    bulk_copy = weight is not None and copies_in_bulk(weight)
    source: Any = hidden
    if tiles.gather and bulk_copy:
        source = TensorDescriptor.from_tensor(hidden.index_select(0, row_index), [tiles.rows, tiles.depth])
    table: Any = weight
    if bulk_copy and weight is not None:
        table = TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth])
    strides = (hidden.stride(0), 0 if weight is None else weight.stride(0))
    flags = {
        "BK": tiles.depth,
        "EVEN_K": depth % tiles.depth == 0,
        "HIDDEN_TMA": tiles.gather and bulk_copy,
        "WEIGHT_TMA": bulk_copy,
        "FROM_LOGITS": weight is None,
        "HAS_SCALE": head.scale != 1.0,
        "HAS_CAP": head.soft_cap > 0.0,
        "PRECISION": "tf32x3" if hidden.dtype == torch.float32 else "ieee",
    }
    return (source, table, head.bias, depth, *strides, head.scale, head.soft_cap), flags
