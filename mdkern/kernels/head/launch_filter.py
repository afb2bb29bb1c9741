"""Launches the kernels of `vocab_projection` that keep a row's logits in memory, which filters and statistics of the
sampler's distribution need. They take a bounded number of logits at a time, with two kernels for each chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mdkern.kernels.device import copies_in_bulk
from mdkern.kernels.head import triton_filter as kernels
from mdkern.kernels.head.arguments import Filters, Head, Outputs, Rows, Wanted, empty_outputs
from mdkern.kernels.head.launch import Tiling, operands, with_unit_strides
from mdkern.kernels.head.triton_filter_search import PER_LANE
from mdkern.kernels.invariant import rows_to_choose_by

GROUP_SIZE = kernels.GROUP_SIZE.value
STATISTICS = kernels.STATISTICS.value
CHUNK_ELEMENTS = 1 << 24  # logits in memory at a time: 64 MiB of float32


@dataclass(frozen=True)
class Search:
    """The shape of a program in the second kernel, which holds ``rows * 128 * warps`` logits at a time."""

    rows: int = 2
    warps: int = 16


REGISTERS = 64  # registers of a thread of the second kernel


def choose_tiling(rows: int, dtype: torch.dtype, bulk_copy: bool, from_logits: bool) -> Tiling:
    """Tiles for at most `rows` rows at a time. Times: docs/notes/output-layer.md."""
    if from_logits:
        return Tiling(16, 256, 64, warps=4, stages=2)
    if dtype == torch.float32:
        return Tiling(32, 64, 32, warps=4, stages=2)
    if rows <= 16:
        return Tiling(16, 128, 128 if bulk_copy else 64, warps=4, stages=3)
    if rows <= 64:
        return Tiling(64, 128, 64, warps=4, stages=4 if bulk_copy else 3)
    if not bulk_copy:
        return Tiling(128, 128, 64, warps=8, stages=3)
    return Tiling(128, 256, 64, warps=8, stages=3, gather=True)


def vocab_projection(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    wanted: Wanted,
    filters: Filters,
    tiling: Tiling | None = None,
    search: Search = Search(),
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Outputs:
    """`mdkern.kernels.vocab_projection` on a GPU (or, on the CPU, in Triton's interpreter)."""
    outputs = empty_outputs(hidden, head, rows, wanted)
    capacity, vocab = rows.row_index.shape[0], head.vocab(hidden)
    if capacity == 0:
        return outputs
    hidden, head, rows = *with_unit_strides(hidden, head), rows.contiguous()
    bulk_copy = head.weight is not None and copies_in_bulk(head.weight)
    groups = triton.cdiv(vocab, GROUP_SIZE)
    collected = PER_LANE.value * 32 * search.warps
    most_rows = max(1, chunk_elements // max(groups * GROUP_SIZE, collected))
    most_at_once = min(rows_to_choose_by(capacity), most_rows)
    tiling = tiling or choose_tiling(most_at_once, hidden.dtype, bulk_copy, head.weight is None)
    if most_rows > tiling.rows:
        most_rows -= most_rows % tiling.rows
    held = min(capacity, most_rows)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    scaled = scratch(held, groups * GROUP_SIZE)
    statistics = scratch(held, STATISTICS, triton.cdiv(vocab, tiling.vocab))
    places = scratch(held, collected + groups)
    constants = {"WANT_TOP": wanted.want_top, "WANT_ENTROPY": wanted.want_entropy, "OF_SAMPLER": wanted.of == "sampler"}
    for first in range(0, capacity, held):
        chunk = min(held, capacity - first)
        write_logits(hidden, head, rows, scaled, statistics, first, chunk, tiling, bulk_copy, constants)
        draw(rows, scaled, statistics, places, outputs, first, chunk, filters, search, constants)
    return outputs


def write_logits(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    scaled: Tensor,
    statistics: Tensor,
    first: int,
    chunk: int,
    tiling: Tiling,
    bulk_copy: bool,
    constants: dict[str, Any],
) -> None:
    """Run the first kernel for rows `first` to ``first + chunk``."""
    vocab = head.vocab(hidden)
    source, table, flags = operands(hidden, head, rows.row_index[first : first + chunk], tiling, bulk_copy)
    kernels.filtered_logits_kernel[(triton.cdiv(chunk, tiling.rows) * triton.cdiv(vocab, tiling.vocab),)](
        source,
        table,
        head.weight_scale,
        head.bias,
        *rows[:4],
        scaled,
        statistics,
        first,
        chunk,
        rows.row_index.shape[0],
        vocab,
        *hidden.shape,
        hidden.stride(0),
        0 if head.weight is None else head.weight.stride(0),
        scaled.shape[1],
        head.scale,
        head.soft_cap,
        BM=tiling.rows,
        BN=tiling.vocab,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **flags,
        **constants,
    )


def draw(
    rows: Rows,
    scaled: Tensor,
    statistics: Tensor,
    places: Tensor,
    outputs: Outputs,
    first: int,
    chunk: int,
    filters: Filters,
    search: Search,
    constants: dict[str, Any],
) -> None:
    """Run the second kernel for rows `first` to ``first + chunk``."""
    token, log_prob, top1, top2, entropy, logsumexp, _ = outputs
    width = scaled.shape[1]
    kernels.filtered_draw_kernel[(chunk,)](
        scaled,
        statistics,
        places,
        *rows[1:],
        token,
        log_prob,
        logsumexp,
        top1,
        top2,
        entropy,
        first,
        rows.row_index.shape[0],
        width,
        statistics.shape[2],
        filters.top_k,
        filters.top_p,
        math.log(filters.min_p) if filters.min_p > 0.0 else 0.0,
        TOP_K=filters.top_k > 0,
        TOP_P=filters.top_p < 1.0,
        WITHIN=filters.top_p_rule == "within",
        MIN_P=filters.min_p > 0.0,
        ROWS=search.rows,
        LANES=32 * search.warps,
        RACERS=min(2048, max(2, triton.next_power_of_2(width // GROUP_SIZE))),
        num_warps=search.warps,
        maxnreg=REGISTERS,
        **constants,
    )
