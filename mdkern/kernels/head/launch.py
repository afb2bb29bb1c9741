"""Launches the vocabulary projection's kernels: chooses tiles, allocates the partial results, runs two kernels."""

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
from mdkern.kernels.head.triton_reduce import vocab_projection_reduce_kernel

if TYPE_CHECKING:
    from mdkern.kernels.head.launch_hopper import HopperTiling
    from mdkern.kernels.head.launch_skinny import FewTiling

GROUP_SIZE = kernels.GROUP_SIZE.value
STATISTICS = kernels.STATISTICS.value
GATHERED = 32 << 20  # bytes: the most that rows gathered for bulk copies may take


@dataclass(frozen=True)
class Tiling:
    """How `triton_projection` cuts its work. With `gather` the rows are copied together, for bulk copies to serve."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    per_processor: int = 1  # programs resident on a multiprocessor at a time
    gather: bool = False
    bulk_copy: bool = True


@cache
def hopper_launcher(device: torch.device) -> ModuleType | None:
    """`launch_hopper` where its kernel runs: on compute capability 9, with Gluon in the Triton package."""
    if not is_hopper(device):
        return None
    try:
        from mdkern.kernels.head import launch_hopper
    except (ImportError, AttributeError):  # Gluon is experimental: another Triton may lack it or name things otherwise
        return None
    return launch_hopper


def choose_tiling(rows: int, hidden: Tensor, bulk_copy: bool, from_logits: bool) -> Tiling | HopperTiling | FewTiling:
    """Tiles for at most `rows` rows: Gluon's on Hopper where they win (`choose_hopper_tiling`), else Triton's.

    Triton's medians on an H100 at D = 768, V = 50,258, sampled with all statistics, over the padded cuBLAS product
    alone: 1.15 at 16 rows, 1.23 at 64, 1.39 at 128, 1.30 at 512, 1.37 at 1,024, 1.30 at 4,096, 1.31 at 16,384. Few
    rows wait for memory: two programs on a multiprocessor hide each other's tile ends. Many rows wait for the tensor
    cores: 128 x 256 is the largest tile that leaves registers for the rows' state, and the rows, gathered first, come
    by bulk copy. (At 1,024 rows 128 x 128 tiles were 5 % faster, but spill registers with temperatures per row.)
    """
    hopper = hopper_launcher(hidden.device) if bulk_copy else None
    tiling: HopperTiling | FewTiling | None = None if hopper is None else hopper.choose_hopper_tiling(rows, hidden)
    if tiling is not None:
        return tiling
    if from_logits:
        return Tiling(16, 128, 64, warps=4, stages=2, per_processor=4)
    if hidden.dtype == torch.float32:
        return Tiling(32, 64, 32, warps=4, stages=2, per_processor=2)
    if rows <= 16:
        return Tiling(16, 128, 128 if bulk_copy else 64, warps=4, stages=3, per_processor=2)
    if rows <= 256:
        return Tiling(64, 128, 64, warps=4, stages=4 if bulk_copy else 3, per_processor=2)
    if not bulk_copy:
        return Tiling(128, 128, 64, warps=8, stages=3)
    return Tiling(128, 256, 64, warps=8, stages=3, gather=True)


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
    tiling: Tiling | HopperTiling | FewTiling | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mdkern.kernels.vocab_projection` on a GPU (or, on the CPU, in Triton's interpreter)."""
    device, capacity = hidden.device, row_index.shape[0]
    outputs = empty_outputs(capacity, want_top, want_entropy, device)
    if capacity == 0:
        return outputs
    hidden = unit_stride(hidden, weight)
    keys, row_index = keys.contiguous(), row_index.contiguous()
    bias = None if bias is None else bias.contiguous()
    temperature = None if temperature is None else temperature.contiguous()
    bulk_copy = weight is not None and copies_in_bulk(weight)
    tiling = tiling or choose_tiling(capacity, hidden, bulk_copy, weight is None)
    programs = programs or num_sms(device) * tiling.per_processor
    options: dict[str, Any] = {
        "PROGRAMS": programs,
        "MODE": kernels.GREEDY if temperature is None and uniform_temperature == 0.0 else kernels.MIXED,
        "WANT_TOP": want_top,
        "WANT_ENTROPY": want_entropy,
    }
    for part in parts(capacity, hidden, tiling.gather):
        rows = (
            row_index[part],
            None if row_count is None else (row_count - part.start).clamp_(min=0) if part.start else row_count,
            None if temperature is None else temperature[part],
            uniform_temperature,
            seed,
            keys[part],
        )
        results = tuple(output[part] for output in outputs)
        project_part(hidden, weight, bias, rows, scale, soft_cap, tiling, bulk_copy, options, results)
    return outputs


def parts(capacity: int, hidden: Tensor, gather: bool) -> list[slice]:
    """The rows, or where they are gathered first, so many at a time that their copy is at most `GATHERED` bytes."""
    held = capacity * hidden.shape[1] * hidden.element_size()
    if not gather or held <= GATHERED:
        return [slice(0, capacity)]
    size = triton.cdiv(triton.cdiv(capacity, triton.cdiv(held, GATHERED)), 128) * 128
    return [slice(start, start + size) for start in range(0, capacity, size)]


def project_part(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: tuple[Any, ...],
    scale: float,
    soft_cap: float,
    tiling: Tiling | HopperTiling | FewTiling,
    bulk_copy: bool,
    options: dict[str, Any],
    outputs: tuple[Tensor, ...],
) -> None:
    """Both kernels, for `rows`: row_index, row_count, temperature(s), seed and keys."""
    device, capacity, programs = hidden.device, rows[0].shape[0], options["PROGRAMS"]
    columns = hidden.shape[1] if weight is None else weight.shape[0]
    hopper = None if isinstance(tiling, Tiling) else hopper_launcher(device)
    if hopper is not None and isinstance(tiling, hopper.FewTiling):
        hopper.project_few(hidden, weight, bias, rows, scale, soft_cap, tiling, options, outputs)
        return
    row_tiles = triton.cdiv(capacity, tiling.rows)
    slots = row_tiles + programs
    statistics = torch.empty((slots, tiling.rows, STATISTICS), dtype=torch.float32, device=device)
    leaders = torch.empty((slots, tiling.rows, GROUP_SIZE), dtype=torch.float32, device=device)
    pdl = launches_early(device)
    arguments = (*rows, statistics, leaders, capacity, columns, hidden.shape[1])
    wanted = {**options, "HAS_SCALE": scale != 1.0, "HAS_CAP": soft_cap > 0.0}
    if isinstance(tiling, Tiling):
        project(hidden, weight, bias, arguments, scale, soft_cap, tiling, bulk_copy and tiling.bulk_copy, pdl, wanted)
    else:
        assert hopper is not None
        hopper.project_on_hopper(hidden, weight, bias, arguments, scale, soft_cap, tiling, wanted)

    split_rows = row_tiles % programs  # row tiles whose vocabulary is split, when all of the capacity is used
    full_splits = programs // split_rows if split_rows else 1
    # Few rows have many splits: a warp per row, which reads them all at once. Three shapes only, to compile no more.
    split_block, rows_at_once = (32, 8) if full_splits <= 32 else (256 if programs <= 256 else 512, 1)
    token, log_prob, top1, top2, entropy, logsumexp = outputs
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
        capacity,
        columns,
        BM=tiling.rows,
        BN=tiling.columns,
        ROWS=rows_at_once,
        SPLITS=split_block,
        PDL=pdl,
        num_warps=1 if rows_at_once == 1 else 4,
        launch_pdl=pdl,
        **options,
    )


def project(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: tuple[Any, ...],
    scale: float,
    soft_cap: float,
    tiling: Tiling,
    bulk_copy: bool,
    pdl: bool,
    wanted: dict[str, Any],
) -> None:
    """The first kernel: partial results into two of the tensors of `rows`."""
    depth = hidden.shape[1]
    gather = tiling.gather and bulk_copy
    source: Any = hidden
    if gather:
        source = TensorDescriptor.from_tensor(hidden.index_select(0, rows[0]), [tiling.rows, tiling.depth])
    table: Any = weight
    if bulk_copy:
        table = TensorDescriptor.from_tensor(weight, [tiling.columns, tiling.depth])
    kernels.vocab_projection_kernel[(wanted["PROGRAMS"],)](
        source,
        table,
        bias,
        *rows,
        hidden.stride(0),
        0 if weight is None else weight.stride(0),
        scale,
        soft_cap,
        BM=tiling.rows,
        BN=tiling.columns,
        BK=tiling.depth,
        EVEN_K=depth % tiling.depth == 0,
        HIDDEN_TMA=gather,
        WEIGHT_TMA=bulk_copy,
        FROM_LOGITS=weight is None,
        PRECISION="tf32x3" if hidden.dtype == torch.float32 else "ieee",
        PDL=pdl,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **wanted,
    )


def empty_outputs(
    capacity: int, want_top: bool, want_entropy: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token, log-probability, top-1, top-2, entropy and logsumexp of `capacity` rows; what is not wanted is empty."""

    def statistic(wanted: bool = True) -> Tensor:
        return torch.empty(capacity if wanted else 0, dtype=torch.float32, device=device)

    token = torch.empty(capacity, dtype=torch.int64, device=device)
    return token, statistic(), statistic(want_top), statistic(want_top), statistic(want_entropy), statistic()


def unit_stride(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """`hidden` with unit stride along its rows, copied if need be; a weight is too large to copy, so it is refused."""
    if weight is not None and weight.stride(1) != 1:
        raise ValueError(f"weight must have unit stride along its rows, not strides {weight.stride()}")
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()
