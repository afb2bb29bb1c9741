"""`begin_tick` and `end_tick`: what a tick of the planned sampler does before and after the model, one launch each.

`begin_tick` gathers the inputs of tick number ``tick`` of a segment; `end_tick` writes the tokens and increments
``tick``. All of it lies on the device at fixed addresses, so that a CUDA graph of one tick, replayed, runs tick after
tick. As separate PyTorch operations they would be about 25 launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdkern.kernels.checks import check_tensor, check_written
from mdkern.kernels.operator import operator


class TickSource(NamedTuple):
    """Where ticks are read from: the state of N sequences and a scratch sequence, number N, and K ticks of S slots.

    The ticks are those of `mdkern.plan.Ticks`. All tensors are contiguous. A slot's sequence is in 0..N, a position in
    0..L-1, a row in 0..S*R-1, `tick` in 0..K-1; this holds for unused slots and rows too, because they are read.
    """

    input_ids: Tensor  # int64 [N + 1, L]
    attention_mask: Tensor | None  # bool [N + 1, L]
    text_position: Tensor  # int64 [N + 1, L]
    sample: Tensor  # int64 [N + 1], sample numbers
    temperature: Tensor  # float32 []
    closing_step: Tensor  # int64 [], the step whose rows have temperature 0
    sequence: Tensor  # int64 [K, S]
    step: Tensor  # int64 [K, S]
    time: Tensor  # float32 [K, S]
    position: Tensor  # int64 [K, S, R]
    row: Tensor  # int64 [K, W]
    row_count: Tensor  # int64 [K]
    tick: Tensor  # int64 [1], number of the tick


class TickInputs(NamedTuple):
    """The inputs of one tick: B sequences, R positions of each, and M rows, of which the first `row_count` are used."""

    input_ids: Tensor  # int64 [B, L]
    attention_mask: Tensor | None  # bool [B, L]
    time: Tensor  # float32 [B]
    positions: Tensor  # int64 [B, R]
    row: Tensor  # int64 [M], into [B * R]
    row_count: Tensor  # int64 []
    keys: Tensor  # int64 [M, 3], sample, position in the text, step
    temperature: Tensor  # float32 [M]
    target: Tensor  # int64 [M], index of the token in the flattened ids; for unused rows, in the scratch sequence


def begin_tick_reference(
    source: TickSource, batch: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`begin_tick` in plain PyTorch."""

    def of_tick(x: Tensor) -> Tensor:
        return x.index_select(0, source.tick)[0]

    input_ids, mask, position = source.input_ids, source.attention_mask, of_tick(source.position)[:batch]
    scratch, width = input_ids.shape[0] - 1, position.shape[-1]
    sequences, steps = of_tick(source.sequence)[:batch], of_tick(source.step)[:batch]
    rows, count = of_tick(source.row)[:capacity], of_tick(source.row_count)
    slot = rows // width
    row_sequence, row_step, row_position = sequences[slot], steps[slot], position.reshape(-1)[rows]
    used = torch.arange(capacity, device=rows.device) < count
    keys = torch.stack((source.sample[row_sequence], source.text_position[row_sequence, row_position], row_step), -1)
    target = torch.where(used, row_sequence, scratch) * input_ids.shape[1] + row_position
    return (
        input_ids[sequences],
        input_ids.new_empty(0, dtype=torch.bool) if mask is None else mask[sequences],
        of_tick(source.time)[:batch].clone(),
        position.clone(),
        rows.clone(),
        count.clone(),
        keys,
        torch.where(row_step == source.closing_step, 0.0, source.temperature),
        target,
    )


def begin_tick_outputs(
    source: TickSource, batch: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised tensors for what `begin_tick` returns. Without an attention mask, that one has no entries."""
    length, width = source.input_ids.shape[1], source.position.shape[-1]

    def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=source.input_ids.device)

    return (
        room(batch, length),
        room(*((0,) if source.attention_mask is None else (batch, length)), dtype=torch.bool),
        room(batch, dtype=torch.float32),
        room(batch, width),
        room(capacity),
        room(),
        room(capacity, 3),
        room(capacity, dtype=torch.float32),
        room(capacity),
    )


begin_tick_operator = operator(
    begin_tick_reference, begin_tick_outputs, "mdkern.kernels.loop.triton_tick:begin_tick", name="begin_tick"
)


def begin_tick(source: TickSource, batch: int, capacity: int) -> TickInputs:
    """Gather the inputs of tick number `tick` from the sampler's state and the segment's ticks.

    Args:
        source: the state and the ticks.
        batch: B, number of sequences to return, at most S.
        capacity: M, number of rows to return, at most W.

    Raises:
        ValueError: more sequences or rows than a tick has.
    """
    if batch > source.sequence.shape[1] or capacity > source.row.shape[1]:
        raise ValueError(
            f"a tick has {source.sequence.shape[1]} slots and {source.row.shape[1]} rows, not {batch} and {capacity}"
        )
    ids, attended, *rest = begin_tick_operator(*source, batch, capacity)
    return TickInputs(ids, None if source.attention_mask is None else attended, *rest)


def end_tick_reference(
    input_ids: Tensor, failed: Tensor, tick: Tensor, token: Tensor, target: Tensor, row_count: Tensor
) -> None:
    """`end_tick` in plain PyTorch."""
    used = torch.arange(token.shape[0], device=token.device) < row_count
    failed |= ((token < 0) & used).any()
    # The target of unused rows is in the scratch sequence, whose ids must stay in the vocabulary.
    ids = input_ids.view(-1)
    ids[target] = torch.where(token < 0, ids[target], token)
    tick += 1


end_tick_operator = operator(
    end_tick_reference,
    lambda *_: None,
    "mdkern.kernels.loop.triton_tick:end_tick",
    mutates=("input_ids", "failed", "tick"),
    name="end_tick",
)


def end_tick(input_ids: Tensor, failed: Tensor, tick: Tensor, token: Tensor, target: Tensor, row_count: Tensor) -> None:
    """Write a tick's tokens into ``input_ids`` and move on to the next tick.

    Args:
        input_ids: int64 ``[N + 1, L]``, contiguous, written in place.
        failed: bool scalar, set if a used row has a negative token (NaN logits), which is not written.
        tick: int64 ``[1]``, incremented.
        token, target: int64 ``[M]``, from `vocab_projection` and `begin_tick`.
        row_count: int64 scalar, number of rows used.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    device = input_ids.device
    check_tensor("input_ids", input_ids, input_ids.shape, torch.int64, device)
    check_written("input_ids", input_ids)
    check_tensor("failed", failed, (), torch.bool, device)
    check_tensor("tick", tick, (1,), torch.int64, device)
    check_tensor("token", token, (token.numel(),), torch.int64, device)
    check_tensor("target", target, (token.numel(),), torch.int64, device)
    check_tensor("row_count", row_count, (), torch.int64, device)
    end_tick_operator(input_ids, failed, tick, token, target, row_count)
