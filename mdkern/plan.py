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

LEAST_CROWDED = 32  # rows of an event: room for fewer is no matter
MOST_PARTS = 16  # of a plan: each may leave a batch that is not full
GIVEN = -1  # reveal step of a position that is not masked


@dataclass(frozen=True)
class Ticks:
    """The events of one segment, packed into batches: what each tick of the sampler works on.

    A tick runs one event of each of up to B sequences. Slots ``0..batch[k]-1`` of tick k are in use. A segment costs
    exactly as many sequence-forward-passes as it has events. Where batch sizes are to be few, each tick runs one of two
    sizes, and fewer slots of a segment idle than the smaller one has.
    """

    sequence: Tensor  # int64 [K, B], row of the state's input_ids; unused slots: the scratch row
    step: Tensor  # int64 [K, B]
    time: Tensor  # float32 [K, B], diffusion time, for time-conditioned denoisers
    position: Tensor  # int64 [K, B, R], positions to reveal, ascending; unused: 0
    row: Tensor  # int64 [K, M], the used entries of position[k].view(-1), ascending; unused: 0
    row_count: Tensor  # int64 [K]
    batch: list[int]  # [K], on the host: slots in use
    size: list[int]  # [K], on the host: slots to run if sizes are to be few, at least `batch`; two values at most
    rows: list[int]  # [K], on the host: row_count

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True)
class RevealPlan:
    """When each position is revealed."""

    step: Tensor  # int64 [N, L]: reveal step in 0..T-1, T for the closing pass, GIVEN where not masked
    steps: int | Tensor  # T, of all or, int64 [N, 1], of each sequence
    # int64 [N, L], non-decreasing with `step`: positions of a sequence with equal order are revealed by one forward
    # pass. None: it is the step.
    order: Tensor | None = None
    time: Tensor | None = None  # float32 [N, L]: diffusion time of the pass, equal within it. None: of no interest

    @staticmethod
    def draw(masked: Tensor, alpha: Tensor, seed: Tensor, sample: Tensor, position: Tensor) -> RevealPlan:
        """Draw the reveal step of every masked position.

        Args:
            masked: bool ``[N, L]``.
            alpha: float64 ``[T + 1]``, non-decreasing from 0: the probability of being revealed before each step, and
                by the end. A position is revealed at step i with probability ``alpha[i + 1] - alpha[i]`` and left to
                the closing pass with probability ``1 - alpha[T]``.
            seed: int64 scalar tensor.
            sample: int64 ``[N]``, the sample numbers that key the draw.
            position: int64 ``[N, L]``, the positions that key it.
        """
        zero = torch.zeros((), dtype=torch.int64, device=masked.device)
        bits = noise.random_bits(seed, sample[:, None], position, zero, zero, noise.PLAN)
        step = torch.searchsorted(alpha[1:].contiguous(), noise.uniform(*bits), right=True)
        return RevealPlan(torch.where(masked, step, GIVEN), alpha.shape[0] - 1)

    def events(self, first: int | Tensor = 0, stop: int | Tensor | None = None) -> Tensor:
        """Number of events of each sequence in steps ``first <= i < stop``, int64 ``[N]``; all of them by default.

        `first` and `stop` are of all sequences or, int64 ``[N, 1]``, of each.
        """
        stop = self.steps + 1 if stop is None else stop
        order = self.step if self.order is None else self.order
        ordered = torch.where((self.step >= first) & (self.step < stop), order, GIVEN).sort(-1).values
        new = torch.ones_like(ordered, dtype=torch.bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        return (new & (ordered != GIVEN)).sum(-1)

    def by_crowding(self, first: int | Tensor, stop: int | Tensor) -> list[RevealPlan]:
        """The plan of steps ``first <= i < stop`` in parts to be run one after the other: few rows an event, then many.

        All ticks that are packed together have room for the most rows of any event. Where few events are far more
        crowded than the others, as a closing pass may be, they have ticks of their own.
        """
        inside = (self.step >= first) & (self.step < stop)
        ordered, place = torch.where(inside, self.step if self.order is None else self.order, GIVEN).sort(-1)
        new = torch.ones_like(inside)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        number = new.cumsum(-1) - 1  # of each position's event within its sequence
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

        Full ticks come first, then smaller ones (`pack`). In each of the two parts the events of all
        sequences are laid end to end and the line is cut into as many slots as are needed, each as long as the part has
        ticks (McNaughton's wrap-around rule): no slot idles but at the end of the last one, and a sequence whose events
        fall into two slots has its early ones in the second slot's start and its late ones in the first slot's end,
        which never overlap because no sequence has more events in a part than that has ticks.

        Args:
            first, stop, batch_size: see above; the steps of all sequences or, int64 ``[N, 1]``, of each.
            round_up: applied to R and M, so that segments of nearly the same shape get the same.

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
        by_event = torch.argsort(key, stable=True)  # by sequence, order, position
        sequence, position = sequence[by_event], position[by_event]
        _, event, event_rows = torch.unique_consecutive(key[by_event], return_inverse=True, return_counts=True)
        event_start = event_rows.cumsum(0) - event_rows
        event_sequence, event_position = sequence[event_start], position[event_start]
        # Closing passes are known by their step, which is that of the longest run.
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

        rank = torch.arange(event.numel(), device=device) - event_start[event]  # of the row within its event
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
    """Rows up to which an event is not crowded, the best first: where telling these apart halves the room at least.

    Args:
        counts: of events by their number of rows.
    """
    events, most = sum(counts), len(counts) - 1
    if most < LEAST_CROWDED:
        return []

    def room(limit: int) -> int:
        few = sum(counts[: limit + 1])
        return few * limit + (events - few) * most

    # Under a sixteenth of the room the larger limit is better: events about a small one make many parts.
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
    early: Tensor  # int64 [N], on the CPU: how many events of each sequence the full ticks take, its first ones

    def place(self, count: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Tick and slot of every event.

        Args:
            count: int64 ``[N]``, each sequence's number of events.
            owner: int64 ``[E]``, the sequence of each event, events of a sequence adjacent and in the order of their
                steps.
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
    ticks = max(rounded_up(total, large), longest)  # there cannot be fewer
    while large > 1 and total <= rounded_up(large) * ticks:
        large = rounded_up(large)
    small = rounded_up(large)
    most = rounded_up(total - small * ticks, large - small) if small < large else ticks
    # Full ticks are too many as soon as too few sequences have an event for each of them.
    full = bisect_left(range(1, most + 1), True, key=lambda number: int(count.clamp(max=number).sum()) < large * number)
    rest = rounded_up(total - large * full, small)  # ticks - full or more: `most` is no more than needed
    if full + rest > ticks + ticks // 16:
        large = rounded_up(total, ticks)
        small = large - 1
        # They can be full: fewer than `large` sequences with more events than that leave small * rest of them at most.
        full = total - small * ticks
        rest = ticks - full
    # Each sequence's share of the full ticks: what the others have no room for, then first come, first served.
    forced = (count - rest).clamp(min=0)
    room = count.clamp(max=full) - forced
    wanted = large * full - int(forced.sum())
    early = forced + (wanted - (room.cumsum(0) - room)).clamp(min=0).minimum(room)
    return Packing(large, full, small, rest, early)


def rounded_up(number: int, by: int = 2) -> int:
    """``number / by``."""
    return -(-number // by)


def wrap_around(start: Tensor, count: Tensor, owner: Tensor, ticks: int) -> tuple[Tensor, Tensor]:
    """Tick and slot of every event, events laid end to end and the line cut every `ticks`.

    Args:
        start, count: int64 ``[N]``, each sequence's first place on the line and its number of events.
        owner: int64 ``[E]``, the sequence of each event, events of a sequence adjacent and in the order of their steps.
    """
    place = torch.arange(owner.numel(), device=owner.device)
    cut = (start // ticks + 1) * ticks  # where the slot that a sequence starts in ends
    beyond = (start + count - cut).clamp(min=0)[owner]  # events of the sequence that fall into the next slot
    # The places past the cut come first in time: turn the sequence's events so that the earliest take them.
    index = place - start[owner]
    kept = count[owner] - beyond
    turned = torch.where(index < beyond, index + kept, index - beyond)
    place = torch.where(beyond > 0, start[owner] + turned, place)
    return place % ticks, place // ticks


def positions_in_text(attention_mask: Tensor) -> Tensor:
    """Positions counted over attended tokens, int64 ``[N, L]``: the draw's key, the same whatever the padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
