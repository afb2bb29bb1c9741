"""`mdkern.kernels.backbone.place_heads` in Triton: each program has a few heads of one kind of one row."""

# mypy: ignore-errors
# ruff: noqa: N803, N806

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.place_heads import place_heads_reference

HEAD_BLOCK = 8  # heads of a program


@triton.jit
def pairs_of(HALF: tl.constexpr, TURNED: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """The dimensions of a head that are paired by its rotation."""
    dimension = tl.arange(0, HALF_BLOCK)
    partner = dimension + HALF
    if TURNED < HALF:
        partner = dimension + tl.where(dimension < TURNED, TURNED, HALF)
        dimension += tl.where(dimension < TURNED, 0, TURNED)
    return dimension, partner


@triton.jit
def load_turned(
    read,  # addresses of the heads, [N, 1]
    norm,
    c,  # [N or 1, HALF_BLOCK]
    s,
    inside,
    eps,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """Heads, normed and rotated: of each pair of dimensions the first and the second, float32 [N, HALF_BLOCK]."""
    dimension, partner = pairs_of(HALF, TURNED, HALF_BLOCK)
    first = tl.load(read + dimension[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        spread = tl.sqrt_rn((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)
        scale = (1.0 / spread)[:, None]
        half = tl.arange(0, HALF_BLOCK) < HALF
        first = first * scale * tl.load(norm + dimension, mask=half, other=0.0).to(tl.float32)[None, :]
        second = second * scale * tl.load(norm + partner, mask=half, other=0.0).to(tl.float32)[None, :]
    return first * c - second * s, second * c + first * s


@triton.jit
def store_turned(
    first, second, write, inside, HALF: tl.constexpr, TURNED: tl.constexpr, HALF_BLOCK: tl.constexpr
):  # fmt: skip
    """Store what `load_turned` gives at the heads' addresses ``write [N, 1]``."""
    dimension, partner = pairs_of(HALF, TURNED, HALF_BLOCK)
    element = write.dtype.element_ty
    tl.store(write + dimension[None, :], first.to(element), mask=inside)
    tl.store(write + partner[None, :], second.to(element), mask=inside)


@triton.jit
def _turn(
    source,  # address of the row's first head
    target,
    target_stride,  # from one head to the next
    norm,
    c,
    s,
    head,
    inside,
    eps,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """Norm and rotate some heads of a row."""
    read, write = source + head[:, None] * (2 * HALF), target + head[:, None] * target_stride
    first, second = load_turned(read, norm, c[None, :], s[None, :], inside, eps, HALF, TURNED, HALF_BLOCK)
    store_turned(first, second, write, inside, HALF, TURNED, HALF_BLOCK)


@triton.jit(do_not_specialize=["length", "table_rows", "room"])
def place_heads_kernel(
    cos,
    sin,
    query,
    key,
    value,
    positions,
    query_norm,
    key_norm,
    kept,
    columns,
    length,  # rows of a sequence
    table_rows,  # P
    room,  # L + 1
    query_stride,
    key_stride,
    value_stride,
    kind_stride,  # of the cache, from keys to values
    sequence_stride,
    column_stride,
    head_stride,
    eps,
    QUERIES: tl.constexpr,  # heads; 0 without queries
    KEYS: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2
    TURNED: tl.constexpr,  # R
    HEADS: tl.constexpr,  # of a program
    HALF_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    QUERY_PARTS: tl.constexpr = (QUERIES + HEADS - 1) // HEADS
    KEY_PARTS: tl.constexpr = (KEYS + HEADS - 1) // HEADS
    dimension = tl.arange(0, HALF_BLOCK)
    half = dimension < HALF
    position = row % length
    if positions is not None:
        position = tl.load(positions + row).to(tl.int64)
    turned = dimension < TURNED
    there = turned & (position >= 0) & (position < table_rows)
    c = tl.load(cos + position * TURNED + dimension, mask=there, other=float("nan"))
    s = tl.load(sin + position * TURNED + dimension, mask=there, other=float("nan"))
    if TURNED < HALF:
        c = tl.where(turned, c, 1.0)
        s = tl.where(turned, s, 0.0)
    if QUERIES > 0:  # noqa: SIM102  a condition of the compiler's, and one of the program's
        if part < QUERY_PARTS:
            head = part * HEADS + tl.arange(0, HEADS)
            inside = (head < QUERIES)[:, None] & half[None, :]
            at = query + row * query_stride
            _turn(at, at, 2 * HALF, query_norm, c, s, head, inside, eps, HALF, TURNED, HALF_BLOCK)
    if KEYS > 0:
        if (part >= QUERY_PARTS) & (part < QUERY_PARTS + KEY_PARTS):
            head = (part - QUERY_PARTS) * HEADS + tl.arange(0, HEADS)
            inside = (head < KEYS)[:, None] & half[None, :]
            at = key + row * key_stride
            if kept is None:
                _turn(at, at, 2 * HALF, key_norm, c, s, head, inside, eps, HALF, TURNED, HALF_BLOCK)
            else:
                column = row % length
                if columns is not None:
                    column = tl.load(columns + row).to(tl.int64)
                inside = inside & (column >= 0) & (column < room)
                to = kept + (row // length) * sequence_stride + column * column_stride
                _turn(at, to, head_stride, key_norm, c, s, head, inside, eps, HALF, TURNED, HALF_BLOCK)
        if kept is not None:  # noqa: SIM102
            if part >= QUERY_PARTS + KEY_PARTS:
                head = (part - QUERY_PARTS - KEY_PARTS) * HEADS + tl.arange(0, HEADS)
                column = row % length
                if columns is not None:
                    column = tl.load(columns + row).to(tl.int64)
                inside = (head < KEYS)[:, None] & half[None, :] & (column >= 0) & (column < room)
                read = value + row * value_stride + head[:, None] * (2 * HALF) + dimension[None, :]
                to = kept + kind_stride + (row // length) * sequence_stride + column * column_stride
                write = to + head[:, None] * head_stride + dimension[None, :]
                tl.store(write, tl.load(read, mask=inside, other=0.0), mask=inside)
                tl.store(write + HALF, tl.load(read + HALF, mask=inside, other=0.0), mask=inside)


def place_heads(
    cos: Tensor,
    sin: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    positions: Tensor | None,
    length: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    kept: Tensor | None,
    columns: Tensor | None,
) -> None:
    """`place_heads` on a GPU (or, on the CPU, in Triton's interpreter)."""
    first = query if query is not None else key
    rows, half = first.shape[0], first.shape[2] // 2
    if first.dtype == torch.float64:
        place_heads_reference(cos, sin, query, key, value, positions, length, query_norm, key_norm, eps, kept, columns)
        return
    queries, keys = 0 if query is None else query.shape[1], 0 if key is None else key.shape[1]
    heads = min(HEAD_BLOCK, triton.next_power_of_2(max(queries, keys, 1)))
    parts = triton.cdiv(queries, heads) + triton.cdiv(keys, heads) * (1 if kept is None else 2)
    if rows == 0 or parts == 0:
        return
    place_heads_kernel[(rows, parts)](
        cos,
        sin,
        query,
        key,
        None if kept is None else value,
        None if positions is None else positions.contiguous(),
        None if query_norm is None else query_norm.contiguous(),
        None if key_norm is None else key_norm.contiguous(),
        kept,
        None if columns is None else columns.contiguous(),
        length,
        cos.shape[0],
        0 if kept is None else kept.shape[2],
        0 if query is None else query.stride(0),
        0 if key is None else key.stride(0),
        0 if value is None else value.stride(0),
        *((0, 0, 0, 0) if kept is None else kept.stride()[:4]),
        eps,
        QUERIES=queries,
        KEYS=keys,
        HALF=half,
        TURNED=cos.shape[1],
        HEADS=heads,
        HALF_BLOCK=triton.next_power_of_2(half),
        num_warps=4 if heads * half >= 512 else 1,
    )
