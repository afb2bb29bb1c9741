"""The reveal plan: every position's reveal step, drawn before the first forward pass.

The ancestral sampler reveals a masked position at step t -> s with probability (t - s) / t whatever the model says, so
the order of the reveals can be drawn first. Only *events*, the steps of a sequence at which at least one of its
positions is revealed, then need a forward pass, and that pass needs its head only at the revealed rows. The samples'
distribution is unchanged.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdkern.kernels import noise

LEAST_CROWDED = 32  # rows of an event; with fewer, the room that all events of a tick need does not matter
MOST_PARTS = 16  # parts of a plan, each of which may leave a batch that is not full
GIVEN = -1  # reveal step of a position that is not masked


@dataclass(frozen=True)
class Ticks:
    """The events of one segment, packed into batches, one for each tick of the sampler.

    A tick runs one event of each of up to B sequences. Slots ``0..batch[k]-1`` of tick k are in use. A segment runs
    exactly as many forward passes of sequences as it has events. For CUDA graphs, each tick runs one of two batch
    sizes, and in a segment fewer slots idle than the smaller size has.
    """

    sequence: Tensor  # int64 [K, B], row of the state's input_ids; unused slots: the scratch row
    step: Tensor  # int64 [K, B]
    time: Tensor  # float32 [K, B], diffusion time, for time-conditioned denoisers
    position: Tensor  # int64 [K, B, R], positions to reveal, ascending; unused: 0
    row: Tensor  # int64 [K, M], the used entries of position[k].view(-1), ascending; unused: 0
    row_count: Tensor  # int64 [K]
    batch: list[int]  # [K], on the host: slots in use
    size: list[int]  # [K], on the host: slots to run with CUDA graphs, at least `batch`; two distinct values at most
    rows: list[int]  # [K], on the host: row_count

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True)
class RevealPlan:
    """The step at which each position is revealed."""

    step: Tensor  # int64 [N, L]: reveal step in 0..T-1, T for the closing pass, GIVEN where not masked
    steps: int | Tensor  # T of all sequences, or int64 [N, 1] of each
    # int64 [N, L], non-decreasing with `step`: positions of a sequence with equal order are revealed by one forward
    # pass. None: the order is the step.
    order: Tensor | None = None
    time: Tensor | None = None  # float32 [N, L]: diffusion time of the position's pass. None: that of its step

    @staticmethod
    def draw(masked: Tensor, alpha: Tensor, seed: Tensor, sample: Tensor, position: Tensor) -> RevealPlan:
        """Draw the reveal step of every masked position.

        Args:
            masked: bool ``[N, L]``.
            alpha: float64 ``[T + 1]``, non-decreasing from 0: the probability that a position has been revealed before
                each step, and after the last one. A position is revealed at step i with probability
                ``alpha[i + 1] - alpha[i]``, and in the closing pass with probability ``1 - alpha[T]``.
            seed: int64 scalar tensor.
            sample: int64 ``[N]``, sample numbers, which key the draw.
            position: int64 ``[N, L]``, positions in the text, which key it, too.
        """
        zero = torch.zeros((), dtype=torch.int64, device=masked.device)
        bits = noise.random_bits(seed, sample[:, None], position, zero, zero, noise.PLAN)
        step = torch.searchsorted(alpha[1:].contiguous(), noise.uniform(*bits), right=True)
        return RevealPlan(torch.where(masked, step, GIVEN), alpha.shape[0] - 1)

    def events(self, first: int | Tensor = 0, stop: int | Tensor | None = None) -> Tensor:
        """Number of events of each sequence in steps ``first <= i < stop``, int64 ``[N]``; by default in all steps.

        `first` and `stop` are numbers for all sequences, or int64 ``[N, 1]`` for each.
        """
        stop = self.steps + 1 if stop is None else stop
        order = self.step if self.order is None else self.order
        ordered = torch.where((self.step >= first) & (self.step < stop), order, GIVEN).sort(-1).values
        new = torch.ones_like(ordered, dtype=torch.bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        return (new & (ordered != GIVEN)).sum(-1)

    def by_crowding(self, first: int | Tensor, stop: int | Tensor) -> list[RevealPlan]:
        """Divide steps ``first <= i < stop`` into plans to be run one after the other, by the rows of their events.

        Ticks that are packed together all have room for the largest number of rows of any event. Where few events have
        far more rows than the others, such as a closing pass, they are put into ticks of their own.
        """
        inside = (self.step >= first) & (self.step < stop)
        ordered, place = torch.where(inside, self.step if self.order is None else self.order, GIVEN).sort(-1)
        new = torch.ones_like(inside)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        number = new.cumsum(-1) - 1  # number of each position's event within its sequence
        rows = torch.zeros_like(ordered).scatter_add_(1, number, (ordered != GIVEN).long())
        for limit in uncrowded(torch.bincount(rows[rows > 0]).tolist()):
            crowded = rows.gather(1, number) > limit
            changed = crowded.clone()
            changed[:, 1:] ^= crowded[:, :-1]
            part = changed.cumsum(-1)
            count = int(part.max()) + 1
            if count <= MOST_PARTS:
                part = torch.zeros_like(part).scatter_(1, place, part)
                steps = [torch.where(inside & (part == index), self.step, GIVEN) for index in range(count)]
                return [replace(self, step=step) for step in steps]
        return [self]

    def ticks(
        self,
        first: int | Tensor,
        stop: int | Tensor,
        batch_size: int,
        round_up: Callable[[int], int] = int,
    ) -> Ticks | None:
        """Pack the events of steps ``first <= i < stop`` into ticks of at most `batch_size` sequences.

        Full ticks come first, then smaller ones (`pack`). In each of these two parts, the events of all sequences are
        laid end to end, and the line is cut into slots, each as long as the part has ticks (McNaughton's wrap-around
        rule). Only the last slot idles, at its end. If a sequence's events fall into two slots, the early ones go to
        the beginning of the second slot and the late ones to the end of the first. These never overlap, because no
        sequence has more events in a part than the part has ticks.

        Args:
            first, stop: numbers for all sequences, or int64 ``[N, 1]`` for each.
            batch_size: most sequences of a tick.
            round_up: applied to R and M, so that segments of similar shapes get equal ones.

        Returns:
            None if there are no events.
        """
        device = self.step.device
        inside = (self.step >= first) & (self.step < stop)
        sequence, position = inside.nonzero(as_tuple=True)
        if sequence.numel() == 0:
            return None
        order = (self.step if self.order is None else self.order)[sequence, position]
        key = sequence * (order.max() + 1) + order
        by_event = torch.argsort(key, stable=True)  # sorts by sequence, order and position
        sequence, position = sequence[by_event], position[by_event]
        _, event, event_rows = torch.unique_consecutive(key[by_event], return_inverse=True, return_counts=True)
        event_start = event_rows.cumsum(0) - event_rows
        event_sequence, event_position = sequence[event_start], position[event_start]
        # A closing pass is marked by its step, which is that of the longest run.
        closing = torch.as_tensor(self.steps, device=device)
        step = torch.where(self.step == closing, closing.max(), self.step)
        event_step = step[event_sequence, event_position]
        event_time = torch.zeros_like(event_step)
        if self.time is not None:
            event_time = self.time[event_sequence, event_position]
        per_sequence = torch.bincount(event_sequence, minlength=self.step.shape[0])
        packing = pack(per_sequence.cpu(), batch_size)
        tick, slot = packing.place(per_sequence, event_sequence)
        size = [packing.large] * packing.full + [packing.small] * packing.rest

        rank = torch.arange(event.numel(), device=device) - event_start[event]  # rank of the row within its event
        width, slots, ticks = round_up(int(event_rows.max())), max(size), len(size)
        sequences = torch.full((ticks, slots), self.step.shape[0], dtype=torch.int64, device=device)
        steps, time = torch.zeros_like(sequences), torch.ones_like(sequences, dtype=torch.float32)
        positions = torch.zeros((ticks, slots, width), dtype=torch.int64, device=device)
        used = torch.zeros_like(positions, dtype=torch.bool)
        sequences[tick, slot], steps[tick, slot], time[tick, slot] = event_sequence, event_step, event_time.float()
        positions[tick[event], slot[event], rank] = position
        used[tick[event], slot[event], rank] = True

        row_count = used.sum((1, 2))
        most = int(row_count.max())
        used_first = torch.sort(~used.view(ticks, -1), dim=-1, stable=True).indices[:, :most]
        row = torch.zeros((ticks, round_up(most)), dtype=torch.int64, device=device)
        row[:, :most] = torch.where(torch.arange(most, device=device) < row_count[:, None], used_first, 0)
        batch = torch.bincount(tick, minlength=ticks).tolist()
        return Ticks(sequences, steps, time, positions, row, row_count, batch, size, row_count.tolist())


def uncrowded(counts: list[int]) -> list[int]:
    """Numbers of rows at which to separate small events from large ones, the best first.

    Only those are returned at which the separation at least halves the room that all events need.

    Args:
        counts: number of events by their number of rows.
    """
    events, most = sum(counts), len(counts) - 1
    if most < LEAST_CROWDED:
        return []

    def room(limit: int) -> int:
        few = sum(counts[: limit + 1])
        return few * limit + (events - few) * most

    # Below a sixteenth of the room a larger limit is better, because a small one leads to many parts.
    largest_first = (1 << power for power in reversed(range(2, most.bit_length())))
    limits = sorted(largest_first, key=lambda limit: max(room(limit), events * most // 16))
    return [limit for limit in limits if 2 * room(limit) <= events * most]


@dataclass(frozen=True)
class Packing:
    """Ticks of two sizes: `full` ones of `large` slots, then `rest` of `small` slots."""

    large: int
    full: int
    small: int
    rest: int
    early: Tensor  # int64 [N], on the CPU: how many of each sequence's first events go to the full ticks

    def place(self, count: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Tick and slot of every event.

        Args:
            count: int64 ``[N]``, number of events of each sequence.
            owner: int64 ``[E]``, the sequence of each event; a sequence's events are adjacent and in order of steps.
        """
        early = self.early.to(count.device)
        index = torch.arange(owner.numel(), device=owner.device) - (count.cumsum(0) - count)[owner]
        tick, slot = torch.empty_like(owner), torch.empty_like(owner)
        for part, counts, first, ticks in (
            (index < early[owner], early, 0, self.full),
            (index >= early[owner], count - early, self.full, self.rest),
        ):
            if ticks:
                at, slot[part] = wrap_around(counts.cumsum(0) - counts, counts, owner[part], ticks)
                tick[part] = first + at
        return tick, slot


def pack(count: Tensor, batch_size: int) -> Packing:
    """Choose the ticks for ``count [N]`` events of each sequence, int64, on the CPU.

    As many ticks as possible are full, and the others have half the size, so that few graphs are captured and the
    number of idle slots is below the size of a small tick. Where this would take over a sixteenth more ticks than are
    needed, because few sequences have most of the events, the sizes are n and n - 1 instead. Why: docs/notes/graphs.md.
    """
    total, longest = int(count.sum()), int(count.max())
    large = min(batch_size, int((count > 0).sum()))
    ticks = max(rounded_up(total, large), longest)  # the fewest possible
    while large > 1 and total <= rounded_up(large) * ticks:
        large = rounded_up(large)
    small = rounded_up(large)
    most = rounded_up(total - small * ticks, large - small) if small < large else ticks
    # There are too many full ticks if too few sequences have an event for each of them.
    full = bisect_left(range(1, most + 1), True, key=lambda number: int(count.clamp(max=number).sum()) < large * number)
    rest = rounded_up(total - large * full, small)  # ticks - full or more: `most` is no more than needed
    if full + rest > ticks + ticks // 16:
        large = rounded_up(total, ticks)
        small = large - 1
        # They can be full: fewer than `large` sequences have more events than that, which leave at most small * rest.
        full = total - small * ticks
        rest = ticks - full
    # Each sequence's share of the full ticks: what does not fit into the other ticks, then first come, first served.
    forced = (count - rest).clamp(min=0)
    room = count.clamp(max=full) - forced
    wanted = large * full - int(forced.sum())
    early = forced + (wanted - (room.cumsum(0) - room)).clamp(min=0).minimum(room)
    return Packing(large, full, small, rest, early)


def rounded_up(number: int, by: int = 2) -> int:
    """``number / by``, rounded up."""
    return -(-number // by)


def wrap_around(start: Tensor, count: Tensor, owner: Tensor, ticks: int) -> tuple[Tensor, Tensor]:
    """Tick and slot of every event, if events are laid end to end and the line is cut every `ticks` events.

    Args:
        start: int64 ``[N]``, each sequence's first place on the line.
        count: int64 ``[N]``, number of events of each sequence.
        owner: int64 ``[E]``, the sequence of each event; a sequence's events are adjacent and in order of steps.
    """
    place = torch.arange(owner.numel(), device=owner.device)
    cut = (start // ticks + 1) * ticks  # end of the slot in which a sequence starts
    beyond = (start + count - cut).clamp(min=0)[owner]  # number of the sequence's events in the next slot
    # Places past the cut come first in time, so the events are rotated to put the earliest ones there.
    index = place - start[owner]
    kept = count[owner] - beyond
    turned = torch.where(index < beyond, index + kept, index - beyond)
    place = torch.where(beyond > 0, start[owner] + turned, place)
    return place % ticks, place // ticks


def positions_in_text(attention_mask: Tensor) -> Tensor:
    """Positions counted without padding, int64 ``[N, L]``. As the key of draws they do not depend on the padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
