"""`mdkern.kernels.backbone.attention` in Triton, for Hopper GPUs: softmax in one pass over the keys (Dao, 2307.08691).

A program is small, four warps with a tile of queries of one head, so that a multiprocessor runs several and some
multiply while others take exponentials. Where there are few of them, two share the keys out, and the one that ends last
adds their parts up, in their order.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from mdkern.kernels.backbone.attention import QUERIES
from mdkern.kernels.device import launches_early
from mdkern.kernels.invariant import is_batch_invariant
from mdkern.kernels.triton_common import LOG2E

WARPS = 4
KEYS, STAGES = 128, 2  # of a step, loaded ahead
MASKED_KEYS, MASKED_STAGES = 64, 3  # with a mask, which takes registers


@triton.jit(do_not_specialize=["queries", "length", "span"])
def attention_kernel(
    query,  # descriptor of [B * Q, H * DIM]
    key,  # descriptors of [B * L, H * DIM]
    value,
    mask,  # uint8 [B, L]
    out,  # [B * Q, H * DIM]
    parts,  # [tiles, SPLITS, ROWS, DIM]; with SPLITS > 1, as the next two
    states,  # [tiles, SPLITS, 2, ROWS]
    arrived,  # [tiles]
    queries,  # Q
    length,  # L
    span,  # keys of a program, a multiple of COLUMNS
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    EVEN: tl.constexpr,  # whether COLUMNS divides L
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,  # launched before the kernel before it has ended
):
    program, split = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(queries, ROWS)
    number = program % row_tiles * ROWS + tl.arange(0, ROWS)
    there = number < queries
    head = program // row_tiles % HEADS
    sequence = program // row_tiles // HEADS
    row = (sequence * queries + number).to(tl.int64)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM], tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    q = query.load([sequence * queries + program % row_tiles * ROWS, head * DIM])
    for start in range(split * span, tl.minimum(split * span + span, length), COLUMNS):
        x = tl.dot(q, key.load([sequence * length + start, head * DIM]).T)
        v = value.load([sequence * length + start, head * DIM])
        column = start + tl.arange(0, COLUMNS)
        if not EVEN:  # what follows is of the next sequence
            x += tl.where(column < length, 0.0, -float("inf"))[None, :]
            v = tl.where((column < length)[:, None], v, 0.0)
        if mask is not None:
            seen = tl.load(mask + sequence.to(tl.int64) * length + column, mask=column < length, other=0) != 0
            x = tl.where(seen[None, :], x, -float("inf"))
        # Rounded before it is compared, so that where the maximum stays the factor is exactly 1, whatever follows.
        peak = tl.maximum(top, tl.max(x, 1) * scale)
        anchor = peak
        if mask is not None:
            anchor = tl.where(peak == -float("inf"), 0.0, peak)
        weight = tl.exp2(x * scale - anchor[:, None])
        rescale = tl.exp2(top - anchor)
        total = total * rescale + tl.sum(weight, 1)
        attended = tl.dot(weight.to(v.dtype), v, attended * rescale[:, None])
        top = peak

    to = out + row[:, None] * (HEADS * DIM) + head * DIM + tl.arange(0, DIM)[None, :]
    if SPLITS == 1:
        if mask is not None:
            total = tl.where(total == 0.0, 1.0, total)
        tl.store(to, (attended / total[:, None]).to(out.dtype.element_ty), mask=there[:, None])
    else:
        at = parts + program.to(tl.int64) * (SPLITS * ROWS * DIM)
        place = tl.arange(0, ROWS)
        at += place[:, None] * DIM + tl.arange(0, DIM)[None, :]
        state = states + program * (SPLITS * 2 * ROWS) + place
        tl.store(at + split * (ROWS * DIM), attended)
        tl.store(state + split * (2 * ROWS), top)
        tl.store(state + split * (2 * ROWS) + ROWS, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + program, 1, sem="acq_rel") == SPLITS - 1:
            peak = tl.load(state, cache_modifier=".cg")
            for part in tl.static_range(1, SPLITS):
                peak = tl.maximum(peak, tl.load(state + part * (2 * ROWS), cache_modifier=".cg"))
            total = tl.zeros([ROWS], tl.float32)
            attended = tl.zeros([ROWS, DIM], tl.float32)
            for part in tl.static_range(SPLITS):
                weight = tl.exp2(tl.load(state + part * (2 * ROWS), cache_modifier=".cg") - peak)
                total += weight * tl.load(state + part * (2 * ROWS) + ROWS, cache_modifier=".cg")
                attended += tl.load(at + part * (ROWS * DIM), cache_modifier=".cg") * weight[:, None]
            tl.store(to, (attended / total[:, None]).to(out.dtype.element_ty), mask=there[:, None])
            tl.store(arrived + program, 0)


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    batch, length, heads, dim = x.shape
    matrix = x.as_strided((batch * length, heads * dim), (x.stride(1), 1))
    return TensorDescriptor.from_tensor(matrix, [rows, dim])


def attention(query: Tensor, key: Tensor, value: Tensor, arrived: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` on a GPU (or, on the CPU, in Triton's interpreter). Counters say that two programs share the keys."""
    (batch, queries, heads, dim), length = query.shape, key.shape[1]
    out = query.new_empty(batch, queries, heads * dim)
    tiles, splits = triton.cdiv(queries, QUERIES) * heads * batch, 1 + bool(arrived.numel())
    if not tiles:
        return out
    small = mask is not None or is_batch_invariant()  # a mask must not change the tile there
    keys, stages = (MASKED_KEYS, MASKED_STAGES) if small else (KEYS, STAGES)
    parts = states = None
    if splits > 1:
        parts = torch.empty((tiles, splits, QUERIES, dim), dtype=torch.float32, device=query.device)
        states = torch.empty((tiles, splits, 2, QUERIES), dtype=torch.float32, device=query.device)
    early = launches_early(query.device)
    attention_kernel[(tiles, splits)](
        describe(query, QUERIES),
        describe(key, keys),
        describe(value, keys),
        None if mask is None else mask.contiguous().view(torch.uint8),
        out,
        parts,
        states,
        arrived if splits > 1 else None,
        queries,
        length,
        triton.cdiv(triton.cdiv(length, keys), splits) * keys,
        dim**-0.5 * LOG2E.value,
        HEADS=heads,
        DIM=dim,
        EVEN=length % keys == 0,
        SPLITS=splits,
        ROWS=QUERIES,
        COLUMNS=keys,
        EARLY=early,
        num_warps=WARPS,
        num_stages=stages,
        launch_pdl=early,
    )
    return out
