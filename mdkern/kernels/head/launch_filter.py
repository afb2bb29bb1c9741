"""Launches the kernels of `vocab_projection` with filters: a bounded number of logits at a time, two kernels each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mdkern.kernels.device import copies_in_bulk
from mdkern.kernels.head import triton_filter as kernels
from mdkern.kernels.head import triton_filter_search
from mdkern.kernels.head.launch import empty_outputs, unit_stride

GROUP_SIZE = kernels.GROUP_SIZE.value
STATISTICS = kernels.STATISTICS.value
SLOTS = triton_filter_search.PER_LANE.value
CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB of float32


@dataclass(frozen=True)
class Tiles:
    """How the product is cut. With `gather` its rows are copied together first, for bulk copies to serve."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    gather: bool = False


@dataclass(frozen=True)
class Search:
    """A program's shape in the second kernel: logits held at a time are ``rows * 128 * warps``."""

    rows: int = 2
    warps: int = 16
    registers: int | None = 64


def choose_tiles(rows: int, dtype: torch.dtype, bulk_copy: bool, from_logits: bool) -> Tiles:
    """Tiles for at most `rows` rows at a time.

    On an H100 at D = 768, V = 50,258 the logits and statistics of 1,024 rows, 256 at a time, took 296 us with tiles of
    128 x 256, 306 with 64 x 128 and 354 with 128 x 128; of 64 rows 40 us with 64 x 128, 52 with 128 x 256.
    """
    if from_logits:
        return Tiles(16, 256, 64, warps=4, stages=2)
    if dtype == torch.float32:
        return Tiles(32, 64, 32, warps=4, stages=2)
    if rows <= 16:
        return Tiles(16, 128, 128 if bulk_copy else 64, warps=4, stages=3)
    if rows <= 64:
        return Tiles(64, 128, 64, warps=4, stages=4 if bulk_copy else 3)
    if not bulk_copy:
        return Tiles(128, 128, 64, warps=8, stages=3)
    return Tiles(128, 256, 64, warps=8, stages=3, gather=True)


def vocab_projection(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor,
    row_count: Tensor | None,
    temperature: Tensor | None,
    uniform_temperature: float,
    seed: Tensor,
    keys: Tensor,
    scale: float,
    soft_cap: float,
    want_top: bool,
    want_entropy: bool,
    top_k: int,
    top_p: float,
    min_p: float,
    tiles: Tiles | None = None,
    search: Search = Search(),
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mdkern.kernels.vocab_projection` with filters on a GPU (or, on the CPU, in Triton's interpreter)."""
    device, capacity = hidden.device, row_index.shape[0]
    columns = hidden.shape[1] if weight is None else weight.shape[0]
    outputs = empty_outputs(capacity, want_top, want_entropy, device)
    if capacity == 0:
        return outputs
    token, log_prob, top1, top2, entropy, logsumexp = outputs
    hidden = unit_stride(hidden, weight)
    keys, row_index = keys.contiguous(), row_index.contiguous()
    bias = None if bias is None else bias.contiguous()
    temperature = None if temperature is None else temperature.contiguous()

    bulk_copy = weight is not None and copies_in_bulk(weight)
    groups = triton.cdiv(columns, GROUP_SIZE)
    width = groups * GROUP_SIZE
    slots = SLOTS * 32 * search.warps
    most_rows = max(1, chunk_elements // max(width, slots))
    tiles = tiles or choose_tiles(min(capacity, most_rows), hidden.dtype, bulk_copy, weight is None)
    if most_rows > tiles.rows:
        most_rows -= most_rows % tiles.rows
    held = min(capacity, most_rows)
    vocab_tiles = triton.cdiv(columns, tiles.columns)
    scaled = torch.empty((held, width), dtype=torch.float32, device=device)
    statistics = torch.empty((held, STATISTICS, vocab_tiles), dtype=torch.float32, device=device)
    scratch = torch.empty((held, slots + groups), dtype=torch.float32, device=device)
    wanted = {"WANT_TOP": want_top, "WANT_ENTROPY": want_entropy}
    filters: dict[str, Any] = {"TOP_K": 0 < top_k < columns, "TOP_P": top_p < 1.0, "MIN_P": min_p > 0.0}
    row = (row_count, temperature, uniform_temperature)
    for first in range(0, capacity, held):
        chunk = min(held, capacity - first)
        write_logits(
            hidden,
            weight,
            bias,
            row_index,
            row,
            scaled,
            statistics,
            first,
            chunk,
            scale,
            soft_cap,
            tiles,
            bulk_copy,
            wanted,
        )
        kernels.filtered_draw_kernel[(chunk,)](
            scaled,
            statistics,
            scratch,
            *row,
            seed,
            keys,
            token,
            log_prob,
            logsumexp,
            top1,
            top2,
            entropy,
            first,
            capacity,
            width,
            vocab_tiles,
            top_k,
            top_p,
            math.log(min_p) if min_p > 0.0 else 0.0,
            **filters,
            **wanted,
            ROWS=search.rows,
            LANES=32 * search.warps,
            RACERS=min(2048, max(2, triton.next_power_of_2(groups))),
            num_warps=search.warps,
            maxnreg=search.registers,
        )
    return token, log_prob, top1, top2, entropy, logsumexp


def write_logits(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor,
    row: tuple[Any, ...],
    scaled: Tensor,
    statistics: Tensor,
    first: int,
    chunk: int,
    scale: float,
    soft_cap: float,
    tiles: Tiles,
    bulk_copy: bool,
    wanted: dict[str, bool],
) -> None:
    """The first kernel, for rows `first` to ``first + chunk``."""
    depth = hidden.shape[1]
    columns = depth if weight is None else weight.shape[0]
    gather = tiles.gather and bulk_copy
    source: Any = hidden
    if gather:
        rows = hidden.index_select(0, row_index[first : first + chunk])
        source = TensorDescriptor.from_tensor(rows, [tiles.rows, tiles.depth])
    table: Any = weight
    if bulk_copy:
        table = TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth])
    kernels.filtered_logits_kernel[(triton.cdiv(chunk, tiles.rows) * triton.cdiv(columns, tiles.columns),)](
        source,
        table,
        bias,
        row_index,
        *row,
        scaled,
        statistics,
        first,
        chunk,
        row_index.shape[0],
        columns,
        depth,
        hidden.stride(0),
        0 if weight is None else weight.stride(0),
        scaled.shape[1],
        scale,
        soft_cap,
        BM=tiles.rows,
        BN=tiles.columns,
        BK=tiles.depth,
        EVEN_K=depth % tiles.depth == 0,
        HIDDEN_TMA=gather,
        WEIGHT_TMA=bulk_copy,
        FROM_LOGITS=weight is None,
        HAS_SCALE=scale != 1.0,
        HAS_CAP=soft_cap > 0.0,
        PRECISION="tf32x3" if hidden.dtype == torch.float32 else "ieee",
        **wanted,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
