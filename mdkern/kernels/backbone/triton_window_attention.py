"""`mdkern.kernels.backbone.window_attention` in Triton: programs have one head of keys and some of its queries each.

The columns of the cache are shared out among the programs of these queries, and the last of them also has the window's
own keys and values, which it rotates and writes to the cache. Nobody reads them from there: the columns that the window
writes are left out of the cache as it is read. So no program waits for another one. Where there are several, the one
that ends last adds their parts up (softmax over parts as in Flash-Decoding, Dao et al., 2023), in their order.
"""

# mypy: ignore-errors
# ruff: noqa: N803

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mdkern.kernels.backbone.triton_place_heads import load_turned, pairs_of, store_turned
from mdkern.kernels.backbone.triton_scaled import scale_and_inverse
from mdkern.kernels.backbone.window_attention import (
    MOST_QUERIES,
    SHORT,
    new_attended,
    window_attention_reference,
)
from mdkern.kernels.device import launches_early
from mdkern.kernels.triton_common import LOG2E


class Setting(NamedTuple):
    """Queries of a program, columns of the cache in a step, and programs among which the columns are shared out."""

    rows: int  # at least `FEWEST_ROWS`
    columns: int
    splits: int
    apart: bool  # whether the window has the last of these programs for itself
    warps: int
    stages: int


@triton.jit
def _angles(
    cos, sin, positions, entry, there, table_rows, HALF: tl.constexpr, TURNED: tl.constexpr, HALF_BLOCK: tl.constexpr
):  # fmt: skip
    """cos and sin of some of a sequence's rows, ``[N, HALF_BLOCK]``; NaN for positions that are not there."""
    dimension = tl.arange(0, HALF_BLOCK)
    position = entry
    if positions is not None:
        found = tl.load(positions + entry, mask=there, other=0)
        position = tl.where((found >= 0) & (found < table_rows), found, -1).to(tl.int32)
    inside = (there & (position >= 0) & (position < table_rows))[:, None] & (dimension < TURNED)[None, :]
    at = position[:, None] * TURNED + dimension[None, :]
    c = tl.load(cos + at, mask=inside, other=float("nan"))
    s = tl.load(sin + at, mask=inside, other=float("nan"))
    if TURNED < HALF:
        c = tl.where((dimension < TURNED)[None, :], c, 1.0)
        s = tl.where((dimension < TURNED)[None, :], s, 0.0)
    return c, s


@triton.jit
def _load_cached(
    kept, kind_stride, column_stride, column, keys, written, HALF: tl.constexpr, TURNED: tl.constexpr,
    HALF_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and values of some columns of the cache, and which of the columns are there and are not written now.

    Those that are written now hold what is out of date, or anything: they are not loaded.
    """
    first_dimension, second_dimension = pairs_of(HALF, TURNED, HALF_BLOCK)
    dimension = tl.arange(0, DIM_BLOCK)
    old = (column < keys) & (tl.max((column[:, None] == written[None, :]).to(tl.int32), 1) == 0)
    at = kept + column[:, None] * column_stride
    inside = old[:, None] & (tl.arange(0, HALF_BLOCK) < HALF)[None, :]
    k_first = tl.load(at + first_dimension[None, :], mask=inside, other=0.0)
    k_second = tl.load(at + second_dimension[None, :], mask=inside, other=0.0)
    v = tl.load(at + kind_stride + dimension[None, :], mask=old[:, None] & (dimension < 2 * HALF)[None, :], other=0.0)
    return k_first, k_second, v, old


@triton.jit
def _attend(
    q_first, q_second, k_first, k_second, v, column, there, mask, mask_row, entry, rows_there, scale,
    top, total, attended, MASK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the softmax over keys. `there`: the columns that count, of which others have keys of 0."""
    x = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
    x = tl.dot(q_second, tl.trans(k_second), x, input_precision=PRECISION)
    if mask is None:
        x = x * scale + tl.where(there, 0.0, -float("inf"))[None, :]
    else:
        at, shown = mask + column[None, :], there[None, :]
        if MASK_ROWS:
            at, shown = at + entry.to(tl.int64)[:, None] * mask_row, shown & rows_there[:, None]
        x = tl.where(shown & (tl.load(at, mask=shown, other=0) != 0), x * scale, -float("inf"))
    peak = tl.maximum(top, tl.max(x, 1))
    anchor = tl.where(peak == -float("inf"), 0.0, peak)
    weight = tl.exp2(x - anchor[:, None])
    rescale = tl.exp2(top - anchor)
    total = total * rescale + tl.sum(weight, 1)
    attended = tl.dot(weight.to(v.dtype), v, attended * rescale[:, None], input_precision=PRECISION)
    return peak, total, attended


@triton.jit
def _finish(
    total, attended, out, out_scales, row, head, there, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    dimension = tl.arange(0, DIM_BLOCK)
    attended = attended * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    if ROUNDED:
        step, inverse = scale_and_inverse(tl.max(tl.abs(attended), 1))
        tl.store(out_scales + row * HEADS + head, step, mask=there)
        attended = attended * inverse[:, None]
    to = out + (row * HEADS + head)[:, None] * DIM + dimension[None, :]
    tl.store(to, attended.to(out.dtype.element_ty), mask=there[:, None] & (dimension < DIM)[None, :])


@triton.jit(do_not_specialize=["width", "keys", "table_rows", "span", "mask_sequence", "mask_row"])
def window_attention_kernel(
    cos,
    sin,
    query,
    key,
    value,
    positions,
    columns,
    query_norm,
    key_norm,
    kept,
    mask,  # uint8
    out,  # [N, Hq * DIM]
    out_scales,  # [N, Hq]; with ROUNDED
    parts,  # [programs, SPLITS, ROWS, DIM_BLOCK]; with SPLITS > 1, as the next two
    states,  # [programs, SPLITS, 2, ROWS]
    arrived,  # [programs]
    width,  # W
    keys,  # L
    table_rows,  # P
    span,  # columns of the cache of a program, a multiple of COLUMNS
    query_stride,
    key_stride,
    value_stride,
    kind_stride,  # of the cache, from keys to values
    sequence_stride,
    column_stride,
    head_stride,
    mask_sequence,
    mask_row,
    eps,
    scale,  # times log2(e)
    HEADS: tl.constexpr,  # of keys
    GROUPS: tl.constexpr,  # heads of queries that share keys
    HALF: tl.constexpr,  # head_dim / 2
    TURNED: tl.constexpr,  # R
    MASK_ROWS: tl.constexpr,  # whether rows of a sequence differ in what they see
    ROUNDED: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,  # the last program has the window's keys, and none of the cache
    WINDOW: tl.constexpr,  # W, or the next power of 2
    ROWS: tl.constexpr,  # queries of a program
    COLUMNS: tl.constexpr,  # of a step
    HALF_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,  # launched before the kernel before it has ended
):
    program, split = tl.program_id(0), tl.program_id(1)
    row_tiles = (GROUPS * width + ROWS - 1) // ROWS
    tile, head = program % row_tiles, program // row_tiles % HEADS
    sequence = (program // row_tiles // HEADS).to(tl.int64)
    first_row = sequence * width
    own = tile * ROWS + tl.arange(0, ROWS)  # number among the group's queries, head by head
    there = own < GROUPS * width
    entry, query_head = own % width, head * GROUPS + own // width
    half = tl.arange(0, HALF_BLOCK) < HALF
    dimension = tl.arange(0, DIM_BLOCK)
    kept += sequence * sequence_stride + head.to(tl.int64) * head_stride
    if mask is not None:
        mask += sequence * mask_sequence
    if positions is not None:
        positions += first_row
    has_window, has_cached = split == SPLITS - 1, True
    if APART:
        has_cached = split < SPLITS - 1

    # What earlier kernels than the product before this one have written may be read before that has ended.
    new_entry = tl.arange(0, WINDOW)
    in_window = new_entry < width
    written = tl.load(columns + first_row + new_entry, mask=in_window, other=-1).to(tl.int32)
    first_column = split * span
    column = first_column + tl.arange(0, COLUMNS)
    k_first, k_second, v, old = _load_cached(
        kept, kind_stride, column_stride, column, keys, written, HALF, TURNED, HALF_BLOCK, DIM_BLOCK
    )
    c, s = _angles(cos, sin, positions, entry, there, table_rows, HALF, TURNED, HALF_BLOCK)
    new_c, new_s = _angles(cos, sin, positions, new_entry, in_window & has_window, table_rows, HALF, TURNED, HALF_BLOCK)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()

    read = query + first_row * query_stride + entry[:, None] * query_stride + query_head[:, None] * (2 * HALF)
    q_first, q_second = load_turned(
        read, query_norm, c, s, there[:, None] & half[None, :], eps, HALF, TURNED, HALF_BLOCK
    )
    q_first, q_second = q_first.to(k_first.dtype), q_second.to(k_first.dtype)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    if has_window:
        place = (written >= 0) & (written < keys)  # not scratch
        new_half = place[:, None] & half[None, :]
        read_key = key + first_row * key_stride + new_entry[:, None] * key_stride + head * (2 * HALF)
        new_first, new_second = load_turned(read_key, key_norm, new_c, new_s, new_half, eps, HALF, TURNED, HALF_BLOCK)
        new_first = tl.where(place[:, None], new_first, 0.0).to(q_first.dtype)
        new_second = tl.where(place[:, None], new_second, 0.0).to(q_first.dtype)
        new_dimension = place[:, None] & (dimension < 2 * HALF)[None, :]
        read_value = value + first_row * value_stride + new_entry[:, None] * value_stride + head * (2 * HALF)
        new_v = tl.load(read_value + dimension[None, :], mask=new_dimension, other=0.0)
        top, total, attended = _attend(
            q_first, q_second, new_first, new_second, new_v, written, place, mask, mask_row, entry, there, scale,
            top, total, attended, MASK_ROWS, PRECISION,
        )  # fmt: skip
        if tile == 0:
            to = kept + written[:, None] * column_stride
            store_turned(new_first, new_second, to, new_half, HALF, TURNED, HALF_BLOCK)
            tl.store(to + kind_stride + dimension[None, :], new_v, mask=new_dimension)
    if has_cached:
        top, total, attended = _attend(
            q_first, q_second, k_first, k_second, v, column, old, mask, mask_row, entry, there, scale,
            top, total, attended, MASK_ROWS, PRECISION,
        )  # fmt: skip
        for start in range(first_column + COLUMNS, tl.minimum(first_column + span, keys), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            k_first, k_second, v, old = _load_cached(
                kept, kind_stride, column_stride, column, keys, written, HALF, TURNED, HALF_BLOCK, DIM_BLOCK
            )
            top, total, attended = _attend(
                q_first, q_second, k_first, k_second, v, column, old, mask, mask_row, entry, there, scale,
                top, total, attended, MASK_ROWS, PRECISION,
            )  # fmt: skip

    row = first_row + entry
    if SPLITS == 1:
        _finish(total, attended, out, out_scales, row, query_head, there, HEADS * GROUPS, 2 * HALF, DIM_BLOCK, ROUNDED)
    else:
        number = tl.arange(0, ROWS)
        inside = there[:, None] & (dimension < 2 * HALF)[None, :]
        at = parts + program.to(tl.int64) * (SPLITS * ROWS * DIM_BLOCK)
        at += number[:, None] * DIM_BLOCK + dimension[None, :]
        state = states + program * (SPLITS * 2 * ROWS) + number
        tl.store(at + split * (ROWS * DIM_BLOCK), attended, mask=inside)
        tl.store(state + split * (2 * ROWS), top)
        tl.store(state + split * (2 * ROWS) + ROWS, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived + program, 1, sem="acq_rel") == SPLITS - 1:
            all_top = tl.full([ROWS], -float("inf"), tl.float32)
            for part in tl.static_range(SPLITS):
                all_top = tl.maximum(all_top, tl.load(state + part * (2 * ROWS), cache_modifier=".cg"))
            anchor = tl.where(all_top == -float("inf"), 0.0, all_top)
            total = tl.zeros([ROWS], tl.float32)
            attended = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
            for part in tl.static_range(SPLITS):
                weight = tl.exp2(tl.load(state + part * (2 * ROWS), cache_modifier=".cg") - anchor)
                total += weight * tl.load(state + part * (2 * ROWS) + ROWS, cache_modifier=".cg")
                its = tl.load(at + part * (ROWS * DIM_BLOCK), mask=inside, other=0.0, cache_modifier=".cg")
                attended += its * weight[:, None]
            _finish(
                total, attended, out, out_scales, row, query_head, there, HEADS * GROUPS, 2 * HALF, DIM_BLOCK, ROUNDED
            )
            tl.store(arrived + program, 0)


UNDIVIDED = Setting(64, 64, 1, False, 4, 3)
DIVIDED = Setting(32, 64, 5, True, 4, 1)
LONGER = Setting(32, 64, 7, True, 4, 2)
SEVERAL = Setting(32, 64, 1, False, 4, 3)


def setting_for(keys: int, rounded: bool, queries: int) -> Setting:
    """By the columns of the cache, whether the product before the kernel is one in e4m3, and queries of all heads.

    That lets the kernel be launched when it begins, so that what lies before its wait for it costs nothing, and short
    caches are attended to sooner than parts of them are added up.
    """
    if keys > SHORT:
        return LONGER
    if rounded:
        return UNDIVIDED
    return DIVIDED if queries <= MOST_QUERIES else SEVERAL


def window_attention(
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    columns: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    kept: Tensor,
    mask: Tensor | None,
    scale: float,
    arrived: Tensor,
    rounded: bool,
    setting: Setting | None = None,
) -> tuple[Tensor, Tensor]:
    """`window_attention` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if query.dtype == torch.float64 or kept.stride(2) * kept.shape[2] >= 1 << 31:
        return window_attention_reference(
            cos, sin, query, key, value, positions, columns, query_norm, key_norm, eps, kept, mask, scale, arrived,
            rounded,
        )  # fmt: skip
    rows, heads, head_dim = query.shape
    _, batch, room, key_heads, _ = kept.shape
    keys, groups = room - 1, heads // key_heads
    out, out_scales = new_attended(cos, sin, query, rounded)
    if not rows:
        return out, out_scales
    setting = setting or setting_for(keys, rounded, rows * heads)
    programs = batch * key_heads * triton.cdiv(groups * (rows // batch), setting.rows)
    splits = setting.splits
    span = triton.cdiv(triton.cdiv(keys, setting.columns), splits - setting.apart) * setting.columns
    half_block, dim_block = (max(16, triton.next_power_of_2(size)) for size in (head_dim // 2, head_dim))
    parts = states = None
    if splits > 1:
        parts = torch.empty((programs, splits, setting.rows, dim_block), dtype=torch.float32, device=query.device)
        states = torch.empty((programs, splits, 2, setting.rows), dtype=torch.float32, device=query.device)
    read_early = (positions, columns, query_norm, key_norm, mask)
    early = launches_early(query.device) and all(x is None or x.is_contiguous() for x in read_early)
    window_attention_kernel[(programs, splits)](
        cos,
        sin,
        query,
        key,
        value,
        None if positions is None else positions.contiguous(),
        columns.contiguous(),
        None if query_norm is None else query_norm.contiguous(),
        None if key_norm is None else key_norm.contiguous(),
        kept,
        None if mask is None else mask.contiguous().view(torch.uint8),
        out,
        out_scales if rounded else None,
        parts,
        states,
        arrived,
        rows // batch,
        keys,
        cos.shape[0],
        span,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        *kept.stride()[:4],
        0 if mask is None or mask.shape[0] == 1 else mask.shape[2] * keys,
        0 if mask is None or mask.shape[2] == 1 else keys,
        eps,
        scale * LOG2E.value,
        HEADS=key_heads,
        GROUPS=groups,
        HALF=head_dim // 2,
        TURNED=cos.shape[1],
        MASK_ROWS=mask is not None and mask.shape[2] > 1,
        ROUNDED=rounded,
        SPLITS=splits,
        APART=setting.apart,
        WINDOW=max(16, triton.next_power_of_2(rows // batch)),
        ROWS=setting.rows,
        COLUMNS=setting.columns,
        HALF_BLOCK=half_block,
        DIM_BLOCK=dim_block,
        PRECISION="ieee",
        EARLY=early,
        num_warps=setting.warps,
        num_stages=setting.stages,
        launch_pdl=early,
    )
    return out, out_scales
