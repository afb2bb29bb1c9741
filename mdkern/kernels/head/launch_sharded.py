"""Launches the kernels of `sharded`: those of `launch`, which write records, and the one that merges records."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from mdkern.kernels.head.arguments import Head, Outputs, Rows, Wanted
from mdkern.kernels.head.launch import project_parts
from mdkern.kernels.head.reference import nothing_found
from mdkern.kernels.head.sharded import empty_merged, empty_records
from mdkern.kernels.head.triton_projection import GREEDY, MIXED
from mdkern.kernels.head.triton_reduce import merge_shards_kernel

ROWS = 16  # rows of a program of the merge, in one warp: two records for each lane and shard


def project_shard(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    wanted: Wanted,
    first: int,
    tiling: Any = None,
    programs: int | None = None,
) -> Tensor:
    """The records of a shard on a GPU (or, on the CPU, in Triton's interpreter)."""
    records = empty_records(hidden, head, rows, wanted, first)
    if head.vocab(hidden) == 0:
        return nothing_found(records)
    project_parts(hidden, head, rows, wanted, tiling, programs, (None,) * 7, records, first)
    return records


def merge_shards(records: Tensor, rows: Rows, wanted: Wanted) -> Outputs:
    """The row statistics from the records of all shards, ``[SHARDS, M, RECORD]``."""
    outputs = empty_merged(records, rows, wanted)
    shards, capacity = records.shape[:2]
    if capacity == 0:
        return outputs
    rows = rows.contiguous()
    token, log_prob, top1, top2, entropy, logsumexp, argmax = outputs
    greedy = rows.temperature is None and rows.uniform_temperature == 0.0
    merge_shards_kernel[(triton.cdiv(capacity, ROWS),)](
        records.contiguous(),
        rows.row_count,
        rows.temperature,
        rows.uniform_temperature,
        token,
        log_prob,
        logsumexp,
        top1,
        top2,
        entropy,
        argmax,
        capacity,
        SHARDS=shards,
        SPLITS=triton.next_power_of_2(shards),
        ROWS=ROWS,
        MODE=GREEDY if greedy else MIXED,
        WANT_TOP=wanted.want_top,
        WANT_ENTROPY=wanted.want_entropy,
        WANT_ARGMAX=wanted.want_argmax,
        OF_SAMPLER=wanted.of == "sampler" and not greedy,
        num_warps=1,
    )
    return outputs
