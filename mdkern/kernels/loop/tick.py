"""`begin_tick` and `end_tick`: what a tick of the sampler does around the model, one launch each.

`begin_tick` reads what tick number ``tick`` of a segment works on; `end_tick` writes the tokens and counts up. All that
is on the device at fixed addresses, so that the same launches, replayed, run tick after tick. As separate PyTorch
operations they are about 25 launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.kernels.device import has_triton


class TickInputs(NamedTuple):
    """What one tick works on: B sequences, R positions of each, M rows of which the first `row_count` are used."""

    input_ids: Tensor  # int64 [B, L]
    attention_mask: Tensor | None  # bool [B, L]
    time: Tensor  # float32 [B]
    positions: Tensor  # int64 [B, R]
    row: Tensor  # int64 [M], into [B * R]
    row_count: Tensor  # int64 []
    keys: Tensor  # int64 [M, 3], sample, position in the text, step
    temperature: Tensor  # float32 [M]
    target: Tensor  # int64 [M], where in the flattened ids the token goes; unused rows: the scratch sequence


def begin_in_pytorch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    text_position: Tensor,
    sample: Tensor,
    temperature: Tensor,
    closing_step: Tensor,
    sequence: Tensor,
    step: Tensor,
    time: Tensor,
    position: Tensor,
    row: Tensor,
    row_count: Tensor,
    tick: Tensor,
    batch: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def of_tick(x: Tensor) -> Tensor:
        return x.index_select(0, tick)[0]

    scratch, width = input_ids.shape[0] - 1, position.shape[-1]
    sequences, steps = of_tick(sequence)[:batch], of_tick(step)[:batch]
    positions = of_tick(position)[:batch]
    rows, count = of_tick(row)[:capacity], of_tick(row_count)
    slot = rows // width
    row_sequence, row_step, row_position = sequences[slot], steps[slot], positions.reshape(-1)[rows]
    used = torch.arange(capacity, device=rows.device) < count
    keys = torch.stack((sample[row_sequence], text_position[row_sequence, row_position], row_step), dim=-1)
    target = torch.where(used, row_sequence, scratch) * input_ids.shape[1] + row_position
    row_temperature = torch.where(row_step == closing_step, 0.0, temperature)
    attended = input_ids.new_empty(0, dtype=torch.bool) if attention_mask is None else attention_mask[sequences]
    return (
        input_ids[sequences],
        attended,
        of_tick(time)[:batch].clone(),
        positions.clone(),
        rows.clone(),
        count.clone(),
        keys,
        row_temperature,
        target,
    )


_begin_tick = torch.library.custom_op("mdkern::begin_tick", begin_in_pytorch, mutates_args=())


@_begin_tick.register_kernel("cuda")
def _begin_on_gpu(
    input_ids: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not has_triton(input_ids.device):
        return begin_in_pytorch(input_ids, *arguments)
    from mdkern.kernels.loop import triton_tick  # imports Triton, which is no business of a machine without a GPU

    return triton_tick.begin_tick(input_ids, *arguments)


@_begin_tick.register_fake
def _begin_fake(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    text_position: Tensor,
    sample: Tensor,
    temperature: Tensor,
    closing_step: Tensor,
    sequence: Tensor,
    step: Tensor,
    time: Tensor,
    position: Tensor,
    row: Tensor,
    row_count: Tensor,
    tick: Tensor,
    batch: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    length, width = input_ids.shape[1], position.shape[-1]

    def ids(*shape: int) -> Tensor:
        return input_ids.new_empty(shape)

    return (
        ids(batch, length),
        ids(0).bool() if attention_mask is None else ids(batch, length).bool(),
        time.new_empty(batch),
        ids(batch, width),
        ids(capacity),
        ids(),
        ids(capacity, 3),
        temperature.new_empty(capacity),
        ids(capacity),
    )


def begin_tick(
    input_ids: Tensor,  # [N + 1, L]
    attention_mask: Tensor | None,  # [N + 1, L]
    text_position: Tensor,  # [N + 1, L]
    sample: Tensor,  # [N + 1]
    temperature: Tensor,  # []
    closing_step: Tensor,  # []
    sequence: Tensor,  # [K, S]
    step: Tensor,  # [K, S]
    time: Tensor,  # [K, S]
    position: Tensor,  # [K, S, R]
    row: Tensor,  # [K, W]
    row_count: Tensor,  # [K]
    tick: Tensor,  # [1]
    batch: int,
    capacity: int,
) -> TickInputs:
    """What tick number `tick` works on, read from the sampler's state and the segment's ticks.

    Args:
        input_ids, text_position: int64 ``[N + 1, L]``; `attention_mask`: bool, or None. Row N is scratch.
        sample: int64 ``[N + 1]``, sample numbers.
        temperature, closing_step: float32 and int64 scalars: rows of the closing step are greedy.
        sequence, step, time, position, row, row_count: a segment's ticks, see `mdkern.plan.Ticks`.
        tick: int64 ``[1]``, which of the K ticks.
        batch: B, sequences of the tick, at most S.
        capacity: M, rows of the tick, at most W.
    """
    ids, attended, *rest = _begin_tick(
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
        batch,
        capacity,
    )
    return TickInputs(ids, None if attention_mask is None else attended, *rest)


def end_in_pytorch(
    input_ids: Tensor, failed: Tensor, tick: Tensor, token: Tensor, target: Tensor, row_count: Tensor
) -> None:
    used = torch.arange(token.shape[0], device=token.device) < row_count
    failed |= ((token < 0) & used).any()
    # Unused rows have a target in the scratch sequence, whose ids must stay ids of the vocabulary.
    ids = input_ids.view(-1)
    ids[target] = torch.where(token < 0, ids[target], token)
    tick += 1


_end_tick = torch.library.custom_op("mdkern::end_tick", end_in_pytorch, mutates_args=("input_ids", "failed", "tick"))


@_end_tick.register_kernel("cuda")
def _end_on_gpu(input_ids: Tensor, *arguments: Any) -> None:
    if not has_triton(input_ids.device):
        return end_in_pytorch(input_ids, *arguments)
    from mdkern.kernels.loop import triton_tick

    triton_tick.end_tick(input_ids, *arguments)


@_end_tick.register_fake
def _end_fake(*_: Any) -> None:
    return None


def end_tick(input_ids: Tensor, failed: Tensor, tick: Tensor, token: Tensor, target: Tensor, row_count: Tensor) -> None:
    """Write a tick's tokens into ``input_ids`` and move on to the next tick.

    Args:
        input_ids: int64 ``[N + 1, L]``, contiguous, written in place.
        failed: bool scalar, set where a used row has a negative token (NaN logits), which is not written.
        tick: int64 ``[1]``, counted up.
        token, target: int64 ``[M]``, from `vocab_projection` and `begin_tick`.
        row_count: int64 scalar: rows used.
    """
    _end_tick(input_ids, failed, tick, token, target, row_count)
