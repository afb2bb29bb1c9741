"""`mdkern.kernels.loop.tick` in Triton."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.loop.tick import TickSource, begin_tick_outputs

BLOCK = 256


@triton.jit
def begin_tick_kernel(
    input_ids,
    attention_mask,
    text_position,
    sample,
    temperature,
    closing_step,
    sequence,
    step,
    time,
    position,
    row,
    row_count,
    tick,
    ids_out,
    mask_out,
    time_out,
    position_out,
    row_out,
    count_out,
    key_out,
    temperature_out,
    target_out,
    batch,  # B
    capacity,  # M
    scratch,  # N
    slots,  # S
    rows,  # W
    length,  # L
    width,  # R
    BLOCK: tl.constexpr,
):
    # Loads that do not need each other go first, and stores last: no load moves before a store that it might read.
    now = tl.load(tick)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = index // length  # `index` is int64: batch * length may be past 2^31
    of_batch, of_rows, of_texts, of_heads = slot < batch, index // width < batch, index < batch, index < capacity
    owner = tl.load(sequence + now * slots + slot, mask=of_batch, other=0)
    place = tl.load(position + now * slots * width + index, mask=of_rows, other=0)
    clock = tl.load(time + now * slots + index, mask=of_texts, other=0.0)
    entry = tl.load(row + now * rows + index, mask=of_heads, other=0)
    count = tl.load(row_count + now)
    closing, warmth = tl.load(closing_step), tl.load(temperature)

    source = owner * length + index % length
    ids = tl.load(input_ids + source, mask=of_batch, other=0)
    if attention_mask is not None:
        seen = tl.load(attention_mask + source, mask=of_batch, other=0)
    slot = entry // width
    owner = tl.load(sequence + now * slots + slot, mask=of_heads, other=0)
    at_step = tl.load(step + now * slots + slot, mask=of_heads, other=0)
    row_place = tl.load(position + now * slots * width + entry, mask=of_heads, other=0)
    number = tl.load(sample + owner, mask=of_heads, other=0)
    text_place = tl.load(text_position + owner * length + row_place, mask=of_heads, other=0)

    tl.store(ids_out + index, ids, mask=of_batch)
    if attention_mask is not None:
        tl.store(mask_out + index, seen, mask=of_batch)
    tl.store(position_out + index, place, mask=of_rows)
    tl.store(time_out + index, clock, mask=of_texts)
    tl.store(count_out, count)
    tl.store(row_out + index, entry, mask=of_heads)
    tl.store(key_out + index * 3, number, mask=of_heads)
    tl.store(key_out + index * 3 + 1, text_place, mask=of_heads)
    tl.store(key_out + index * 3 + 2, at_step, mask=of_heads)
    tl.store(temperature_out + index, tl.where(at_step == closing, 0.0, warmth), mask=of_heads)
    tl.store(target_out + index, tl.where(index < count, owner, scratch) * length + row_place, mask=of_heads)


def begin_tick(
    source: TickSource, batch: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mdkern.kernels.loop.tick.begin_tick` on a GPU (or, on the CPU, in Triton's interpreter)."""
    (sequences, length), (_, slots, width) = source.input_ids.shape, source.position.shape
    assert all(tensor is None or tensor.is_contiguous() for tensor in source)
    outputs = begin_tick_outputs(source, batch, capacity)
    begin_tick_kernel[(triton.cdiv(max(batch * length, batch * width, capacity, 1), BLOCK),)](
        *source,
        *outputs,
        batch,
        capacity,
        sequences - 1,
        slots,
        source.row.shape[1],
        length,
        width,
        BLOCK=BLOCK,
        num_warps=2,
    )
    return outputs


@triton.jit
def end_tick_kernel(input_ids, failed, tick, token, target, row_count, capacity, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = (index < capacity) & (index < tl.load(row_count))
    drawn = tl.load(token + index, mask=used, other=0)
    at = tl.load(target + index, mask=used, other=0)
    tl.store(input_ids + at, drawn, mask=used & (drawn >= 0))
    if tl.min(drawn, 0) < 0:
        tl.store(failed, True)
    if tl.program_id(0) == 0:
        tl.store(tick, tl.load(tick) + 1)


def end_tick(input_ids: Tensor, failed: Tensor, tick: Tensor, token: Tensor, target: Tensor, row_count: Tensor) -> None:
    """`mdkern.kernels.loop.tick.end_tick` on a GPU (or, on the CPU, in Triton's interpreter)."""
    capacity = token.shape[0]
    end_tick_kernel[(max(1, triton.cdiv(capacity, BLOCK)),)](
        input_ids, failed, tick, token.contiguous(), target.contiguous(), row_count, capacity, BLOCK=BLOCK, num_warps=2
    )
