"""`vocab_projection` with the vocabulary divided over processes: what each computes of its part, and how it is merged.

Each process has some rows of the weight, a *shard* of the vocabulary, and the same hidden states. `project_shard`
reduces the shard's logits of each row to a *record* of eight numbers, as a program of the kernels does with its part of
the vocabulary; the processes exchange their records, never logits; and `merge_shards` makes the row statistics of the
whole vocabulary from them. The noise is keyed by the id in the whole vocabulary, so the tokens are those of
`vocab_projection`, except where two candidates' scores are as close as float32 rounds them (one row in a million).

The numbers of a record, float32, with logits x of the shard, their maximum m, and temperature T:

| | |
| --- | --- |
| 0 | m; `LOWEST` instead of -inf |
| 1 | the sum of exp(x - m) |
| 2 | the sum of exp(x - m) (x - m) / log 2 |
| 3 | the second largest x |
| 4 | of the shard's candidate for the token, exp(score - m / T), where the score has the noise in it; its x if T is 0 |
| 5 | the candidate's id, as the bits of an int32 |
| 6 | the id of m, likewise |
| 7 | the candidate's x |

If the statistics are to be those of the sampler's distribution, x is divided by T first, and T is 1 from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from mdkern.kernels.head import reference
from mdkern.kernels.head.arguments import Head, Of, Outputs, Rows, Wanted, empty_outputs
from mdkern.kernels.head.vocab_projection import RowStatistics, check_head, check_rows
from mdkern.kernels.operator import operator

RECORD = 8
ALIGNMENT = 256  # shards begin at multiples of it: the widest tile of the kernels, and a multiple of a group of ids


def shard_of(vocab: int, rank: int, ranks: int) -> tuple[int, int]:
    """First id of a process's shard, and the id after its last: shares that differ by `ALIGNMENT` at most, in order."""
    tiles = -(-vocab // ALIGNMENT)
    first, stop = (min(vocab, tiles * place // ranks * ALIGNMENT) for place in (rank, rank + 1))
    return first, stop


def empty_records(hidden: Tensor, head: Head, rows: Rows, wanted: Wanted, first: int) -> Tensor:
    return hidden.new_empty((rows.row_index.shape[0], RECORD), dtype=torch.float32)


def empty_merged(records: Tensor, rows: Rows, wanted: Wanted) -> Outputs:
    return empty_outputs(records, Head(None, None, 1.0, 0.0), rows, wanted)


_project_shard = operator(
    reference.project_shard, empty_records, kernels="mdkern.kernels.head.launch_sharded:project_shard"
)
_merge_shards = operator(
    reference.merge_shards, empty_merged, kernels="mdkern.kernels.head.launch_sharded:merge_shards"
)


def vocab_projection_sharded(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V of the shard, D]
    bias: Tensor | None,  # [V of the shard]
    row_index: Tensor,  # [M]
    temperature: Tensor | float,  # [M]
    seed: Tensor,  # []
    keys: Tensor,  # [M, 3]
    *,
    first: int,
    exchange: Callable[[Tensor], Tensor],
    row_count: Tensor | None = None,  # []
    scale: float = 1.0,
    soft_cap: float = 0.0,
    weight_scale: Tensor | None = None,  # [V of the shard]
    want_top: bool = False,
    want_entropy: bool = False,
    want_argmax: bool = False,
    of: Of = "model",
) -> RowStatistics:
    """`vocab_projection` of the whole vocabulary, of which this process has the ids from `first` on.

    To be called by all processes with the same arguments but for `weight`, `weight_scale`, `bias` and
    `first`. There are no filters:
    where one cuts is found by a search through all logits of a row, which no process has.

    Args:
        first: id of the weight's first row, a multiple of `ALIGNMENT`; see `shard_of`.
        exchange: given this process's records ``[M, RECORD]``, returns those of all processes ``[R, M, RECORD]`` in
            the order of their ids.
        others: as in `vocab_projection`.

    Raises:
        ValueError: as `vocab_projection`.
    """
    head = Head(weight, bias, scale, soft_cap, weight_scale)
    per_row, uniform = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    rows = Rows(row_index, row_count, per_row, uniform, seed, keys)
    check_head(hidden, head)
    check_rows(hidden, rows)
    if of not in get_args(Of):
        raise ValueError(f"of must be one of {', '.join(get_args(Of))}, not {of!r}")
    if first % ALIGNMENT or first < 0:
        raise ValueError(f"first must be a multiple of {ALIGNMENT}, at which a shard may begin, not {first}")
    rows, wanted = rows.contiguous(), Wanted(want_top, want_entropy, of, want_argmax)
    records = exchange(_project_shard(hidden, *head, *rows, *wanted, first))
    token, log_prob, top1, top2, entropy, logsumexp, argmax = _merge_shards(records, *rows, *wanted)
    return RowStatistics(
        token,
        log_prob,
        logsumexp,
        top1 if want_top else None,
        top2 if want_top else None,
        entropy if want_entropy else None,
        argmax if want_argmax else None,
    )
