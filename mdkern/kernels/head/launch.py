"""Launches the vocabulary projection's kernels: chooses tiles, allocates partial results, and runs two kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mdkern.kernels.device import copies_in_bulk, is_hopper, launches_early, num_sms
from mdkern.kernels.head import triton_projection as kernels
from mdkern.kernels.head.arguments import NO_FILTERS, Filters, Head, Outputs, Rows, Wanted, empty_outputs
from mdkern.kernels.head.triton_reduce import vocab_projection_reduce_kernel
from mdkern.kernels.invariant import is_batch_invariant, rows_to_choose_by

if TYPE_CHECKING:
    from mdkern.kernels.head.launch_hopper import HopperTiling
    from mdkern.kernels.head.launch_skinny import SkinnyTiling

GROUP_SIZE = kernels.GROUP_SIZE.value
STATISTICS = kernels.STATISTICS.value
GATHERED = 32 << 20  # most bytes of rows that are gathered for bulk copies
FIXED_ROWS = 2048  # most rows at a time in the batch-invariant mode, where each has many partial results


@dataclass(frozen=True)
class Tiling:
    """How a Triton kernel divides its product. With `gather`, rows are first copied to one matrix for bulk copies."""

    rows: int
    vocab: int
    hidden_dim: int
    warps: int
    stages: int
    programs_per_sm: int = 1
    gather: bool = False


@cache
def hopper_launcher(device: torch.device) -> ModuleType | None:
    """`launch_hopper` if its kernels run here, which needs compute capability 9, and Gluon in Triton; else None."""
    if not is_hopper(device):
        return None
    try:
        from mdkern.kernels.head import launch_hopper
    except (ImportError, AttributeError):  # Gluon is experimental; other versions of Triton may lack it or differ
        return None
    return launch_hopper


def choose_tiling(
    rows: int, hidden: Tensor, bulk_copy: bool, from_logits: bool, float8: bool = False
) -> Tiling | HopperTiling | SkinnyTiling:
    """Tiles for at most `rows` rows: for Gluon on Hopper where it is faster, else for Triton.

    With few rows, memory is the limit, and two programs on a multiprocessor hide the ends of each other's tiles. With
    many rows, the tensor cores are the limit: 128 x 256 is the largest tile that leaves registers for the state of the
    rows, which are gathered first and then read by bulk copies. Times: docs/notes/output-layer.md.
    """
    hopper = hopper_launcher(hidden.device) if bulk_copy else None
    tiling: HopperTiling | SkinnyTiling | None = None
    if hopper is not None:
        tiling = hopper.choose_hopper_tiling(rows, hidden, float8)
    if tiling is not None:
        return tiling
    if from_logits:
        return Tiling(16, 128, 64, warps=4, stages=2, programs_per_sm=4)
    if hidden.dtype == torch.float32:
        return Tiling(32, 64, 32, warps=4, stages=2, programs_per_sm=2)
    if rows <= 16:
        return Tiling(16, 128, 128 if bulk_copy else 64, warps=4, stages=3, programs_per_sm=2)
    if rows <= 256:
        return Tiling(64, 128, 64, warps=4, stages=4 if bulk_copy else 3, programs_per_sm=2)
    if not bulk_copy:
        return Tiling(128, 128, 64, warps=8, stages=3)
    return Tiling(128, 256, 64, warps=8, stages=3, gather=True)


def vocab_projection(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    wanted: Wanted,
    filters: Filters = NO_FILTERS,
    tiling: Tiling | HopperTiling | SkinnyTiling | None = None,
    programs: int | None = None,
) -> Outputs:
    """`mdkern.kernels.vocab_projection` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if filters.active():
        from mdkern.kernels.head import launch_filter

        return launch_filter.vocab_projection(hidden, head, rows, wanted, filters)
    outputs = empty_outputs(hidden, head, rows, wanted)
    project_parts(hidden, head, rows, wanted, tiling, programs, outputs)
    return outputs


def project_parts(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    wanted: Wanted,
    tiling: Tiling | HopperTiling | SkinnyTiling | None,
    programs: int | None,
    outputs: tuple[Tensor | None, ...],
    records: Tensor | None = None,
    first: int | None = None,
) -> None:
    """Run both kernels for as many rows at a time as may be gathered.

    Args:
        outputs, records: what is written: the outputs, or a shard's records ``[M, RECORD]``.
        first: the id of the weight's first row, for a shard.
    """
    capacity = rows.row_index.shape[0]
    if capacity == 0:
        return
    hidden, head, rows = *with_unit_strides(hidden, head), rows.contiguous()
    bulk_copy = head.weight is not None and copies_in_bulk(head.weight)
    tiling = tiling or choose_tiling(
        rows_to_choose_by(capacity), hidden, bulk_copy, head.weight is None, head.weight_scale is not None
    )
    greedy = rows.temperature is None and rows.uniform_temperature == 0.0
    constants: dict[str, Any] = {
        "PROGRAMS": programs or num_sms(hidden.device) * tiling.programs_per_sm,
        "FIXED": is_batch_invariant(),
        "MODE": kernels.GREEDY if greedy else kernels.MIXED,
        "WANT_TOP": wanted.want_top,
        "WANT_ENTROPY": wanted.want_entropy,
        "WANT_ARGMAX": wanted.want_argmax,
        "OF_SAMPLER": wanted.of == "sampler" and not greedy,
    }
    for part in parts(capacity, hidden, tiling.gather):
        results = tuple(None if output is None else output[part] for output in (*outputs, records))
        project_part(hidden, head, rows.part(part), tiling, bulk_copy, constants, results, first)


def parts(capacity: int, hidden: Tensor, gather: bool) -> list[slice]:
    """Slices of the rows: all at once, or, if they are gathered first, of at most `GATHERED` bytes each."""
    if is_batch_invariant():
        return [slice(start, start + FIXED_ROWS) for start in range(0, capacity, FIXED_ROWS)]
    held = capacity * hidden.shape[1] * hidden.element_size()
    if not gather or held <= GATHERED:
        return [slice(0, capacity)]
    size = triton.cdiv(triton.cdiv(capacity, triton.cdiv(held, GATHERED)), 128) * 128
    return [slice(start, start + size) for start in range(0, capacity, size)]


def project_part(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    tiling: Tiling | HopperTiling | SkinnyTiling,
    bulk_copy: bool,
    constants: dict[str, Any],
    results: tuple[Tensor | None, ...],
    first: int | None,
) -> None:
    """Run both kernels for some rows. `results`: the outputs and the shard's records."""
    device, capacity, programs = hidden.device, rows.row_index.shape[0], constants["PROGRAMS"]
    hopper = None if isinstance(tiling, Tiling) else hopper_launcher(device)
    if hopper is not None and isinstance(tiling, hopper.SkinnyTiling):
        hopper.project_skinny(hidden, head, rows, tiling, constants, results, first)
        return
    row_tiles = triton.cdiv(capacity, tiling.rows)
    partials = row_tiles + programs
    if constants["FIXED"]:
        vocab_tiles = triton.cdiv(head.vocab(hidden), tiling.vocab)
        partials = row_tiles * triton.cdiv(vocab_tiles, triton.cdiv(vocab_tiles, programs))
    statistics = torch.empty((partials, tiling.rows, STATISTICS), dtype=torch.float32, device=device)
    leaders = torch.empty((partials, tiling.rows, GROUP_SIZE), dtype=torch.float32, device=device)
    if isinstance(tiling, Tiling):
        project(hidden, head, rows, (statistics, leaders), tiling, bulk_copy, constants, first)
    else:
        assert hopper is not None
        hopper.project_on_hopper(hidden, head, rows, (statistics, leaders), tiling, constants, first)

    split_rows = row_tiles % programs  # number of row tiles whose vocabulary is split, if all rows are used
    full_splits = programs if constants["FIXED"] else programs // split_rows if split_rows else 1
    # Few rows have many splits: one warp for each row reads them all at once. There are only three shapes.
    split_block, rows_at_once = (32, 8) if full_splits <= 32 else (256 if programs <= 256 else 512, 1)
    early = launches_early(device)
    token, log_prob, top1, top2, entropy, logsumexp, argmax, records = results
    vocab_projection_reduce_kernel[(triton.cdiv(capacity, rows_at_once),)](
        statistics,
        leaders,
        *rows[1:],
        token,
        log_prob,
        logsumexp,
        top1,
        top2,
        entropy,
        argmax,
        records,
        capacity,
        head.vocab(hidden),
        BM=tiling.rows,
        BN=tiling.vocab,
        ROWS=rows_at_once,
        SPLITS=split_block,
        PDL=early,
        num_warps=1 if rows_at_once == 1 else 4,
        launch_pdl=early,
        **constants,
    )


def project(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    partial_results: tuple[Tensor, Tensor],
    tiling: Tiling,
    bulk_copy: bool,
    constants: dict[str, Any],
    first: int | None,
) -> None:
    """Run the first kernel: statistics and leading groups of each part of the vocabulary."""
    source, table, flags = operands(hidden, head, rows.row_index, tiling, bulk_copy)
    kernels.vocab_projection_kernel[(constants["PROGRAMS"],)](
        source,
        table,
        head.weight_scale,
        head.bias,
        *rows,
        *partial_results,
        rows.row_index.shape[0],
        head.vocab(hidden),
        *hidden.shape,
        hidden.stride(0),
        0 if head.weight is None else head.weight.stride(0),
        head.scale,
        head.soft_cap,
        first,
        BM=tiling.rows,
        BN=tiling.vocab,
        PDL=launches_early(hidden.device),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **flags,
        **constants,
    )


def operands(
    hidden: Tensor, head: Head, row_index: Tensor, tiling: Any, bulk_copy: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """The rows and the weight for `triton_common.tile_logits`, and the constants that say how it reads them."""
    gather = tiling.gather and bulk_copy
    source: Any = hidden
    if gather:
        source = TensorDescriptor.from_tensor(hidden.index_select(0, row_index), [tiling.rows, tiling.hidden_dim])
    table: Any = head.weight if head.weight_scale is None else bits_of(head.weight)
    if bulk_copy:
        table = TensorDescriptor.from_tensor(table, [tiling.vocab, tiling.hidden_dim])
    return (
        source,
        table,
        {
            "BK": tiling.hidden_dim,
            "EVEN_K": hidden.shape[1] % tiling.hidden_dim == 0,
            "HIDDEN_TMA": gather,
            "WEIGHT_TMA": bulk_copy,
            "FROM_LOGITS": head.weight is None,
            "PRECISION": "tf32x3" if hidden.dtype == torch.float32 else "ieee",
            "HAS_SCALE": head.scale != 1.0,
            "HAS_CAP": head.soft_cap > 0.0,
        },
    )


def bits_of(weight: Tensor | None) -> Tensor | None:
    """The bits of a weight in float8, uint8, as Triton has no float8 for compute capability 8.0."""
    return None if weight is None else weight.view(torch.uint8)


def with_unit_strides(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """The tensors with unit stride within rows, copied if needed. A weight is large, so it is refused instead."""
    if head.weight is not None and head.weight.stride(1) != 1:
        raise ValueError(f"weight must have unit stride along its rows, not strides {head.weight.stride()}")
    bias, weight_scale = (None if part is None else part.contiguous() for part in (head.bias, head.weight_scale))
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    return hidden, head._replace(bias=bias, weight_scale=weight_scale)
