"""Compiles the large kernels of a `DiT`'s first pass side by side instead of one after the other.

Triton compiles a kernel when it is first launched, which takes seconds for each of `kernels.backbone.linear` on Hopper.
Most of that time is spent outside of Python's lock, so threads share it out over the cores. Times:
docs/notes/first-call.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mdkern.kernels.backbone import linear as products
from mdkern.kernels.backbone.folded_norm import new_sums
from mdkern.kernels.backbone.linear_fp8 import scaled_gelu, scaled_residual
from mdkern.kernels.backbone.quantise import FP8
from mdkern.kernels.device import num_sms
from mdkern.kernels.invariant import batch_invariant, is_batch_invariant
from mdkern.models.dit import DiT
from mdkern.models.dit_fp8 import QuantisedBlock
from mdkern.models.dit_fused import FoldedBlock, Folds, Operands, Stream, modulation, qkv_of, quantised_qkv

logger = logging.getLogger(__name__)

ROWS_OF_A_TILE = 128  # the fewest of a kernel's row tiles; with one for each multiprocessor, more rows change nothing
_compiled: set[Hashable] = set()


def compile_together(model: DiT, folds: Folds, rows: int) -> None:
    """Launch each large kernel of `dit_fused.hidden` once on zeros, at the same time, unless that has been done.

    Args:
        folds: of the model, as for `dit_fused.hidden`.
        rows: number of positions of the largest pass.
    """
    device, config = model.embedding.device, model.config
    rows = min(rows, ROWS_OF_A_TILE * num_sms(device))
    key = device, model.embedding.dtype, config, rows, is_batch_invariant(), folds and folds.precision
    if key in _compiled:
        return
    _compiled.add(key)
    jobs = first_launches(model, folds, rows)
    together = batch_invariant if is_batch_invariant() else nullcontext

    def run(job: Callable[[], Any]) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.no_grad(), together():
            try:
                job()
            except Exception as error:  # the pass itself will meet it, and raise it where it belongs
                logger.debug("could not be compiled beforehand: %s", error)

    with ThreadPoolExecutor(len(jobs)) as threads:
        list(threads.map(run, jobs))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # before the memory of the zeros is used by another stream


def first_launches(model: DiT, folds: Folds, rows: int) -> list[Callable[[], Any]]:
    """A call of each kind of product that `dit_fused.hidden` makes with `folds`, on zeros."""
    block, last = model.blocks[0], folds.blocks[-1]
    _, _, gate1, _, _, gate2 = modulation(block.modulation, None)  # type: ignore[arg-type]
    width, wide = model.config.width, model.config.mlp_ratio * model.config.width

    def zeros(columns: int) -> Tensor:
        return model.embedding.new_zeros(rows, columns)

    def up() -> Tensor:
        x = zeros(width)
        return products.linear_gelu(x, *folds.blocks[0].mlp_up, sums=new_sums(x).zero_())

    def heads() -> Tensor:
        x, length = zeros(width), min(rows, model.config.max_length)
        second = folds.blocks[1]
        assert isinstance(second, FoldedBlock)
        assert second.attn_qkv is not None
        return qkv_of(block, Operands(x, *second.attn_qkv, new_sums(x).zero_()), 3, 2, model.rotary, length)  # type: ignore[arg-type]

    def added(layer: Any, columns: int, gate: Tensor, sums: bool = True) -> None:
        x = zeros(width)
        out = new_sums(x) if sums else None
        products.linear_residual(x, zeros(columns), layer.weight, layer.bias, gate, sums=out)

    if isinstance(last, QuantisedBlock):
        normed, units = (zeros(columns).to(FP8) for columns in (width, wide))
        jobs = [
            lambda: scaled_gelu(normed, *last.mlp_up, last.level),
            lambda: scaled_residual(zeros(width), units, *last.mlp_down),
            lambda: added(block.attn_out, width, gate1, sums=False),  # of the first block
        ]
        if last.attention is not None:
            length = min(rows, model.config.max_length)
            jobs.append(lambda: quantised_qkv(model, Stream(zeros(width)), last, 3, 2, length))
        return jobs
    jobs = [up, lambda: added(block.attn_out, width, gate1), lambda: added(block.mlp_down, wide, gate2)]
    jobs += [heads] if len(folds.blocks) > 1 else []
    # The last block's few rows are cuBLAS's, but for the batch-invariant mode.
    jobs += [lambda: added(block.mlp_down, wide, gate2, sums=False)] if is_batch_invariant() else []
    return jobs
