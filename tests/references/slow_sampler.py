"""A slow sampler to hold the real one against: one sequence, one step, one position at a time, float64 logits.

It drives the decoders through `View`, `Proposal` and `Choice` as the sampler does, and draws the same keyed noise, so
the sampler has to give the very same sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mdkern import Denoiser, adapt
from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.kernels import noise
from tests.references import decoding_rules as reference

GROUP_SIZE = 64  # of `vocab_projection`'s draw


class PairModel:
    """A denoiser of L positions whose logits at each depend on every id: a sum of one random row per (place, id)."""

    def __init__(self, length: int, vocab: int, seed: int = 0, sharpness: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.length, self.vocab, self.mask_id = length, vocab, vocab
        rows = torch.randn(length, length, vocab + 1, vocab, generator=generator, dtype=torch.float64)
        self.table = rows * (sharpness / length**0.5)

    def logits(self, input_ids: Tensor) -> Tensor:
        """float64 ``[B, L, V]`` of ids ``[B, L]``."""
        place = torch.arange(self.length)
        return self.table[place[None, :, None], place[None, None, :], input_ids[:, None, :]].sum(2)

    def of(self, ids: Sequence[int], step: int) -> list[list[float]]:
        """Logits by position of one sequence, as `decode` asks for them."""
        rows: list[list[float]] = self.logits(torch.tensor([ids]))[0].tolist()
        return rows

    def denoiser(self) -> Denoiser:
        """The same model for `mdkern.sample`."""

        def logits(input_ids: Tensor) -> Tensor:
            return self.logits(input_ids).float()

        return adapt(logits, vocab_size=self.vocab, mask_id=self.mask_id)


@dataclass
class Outcome:
    """What became of one sequence."""

    ids: list[int]
    reveal_step: list[int]  # schedule step of the last reveal or edit, -1 where given
    steps_run: list[int] = field(default_factory=list)  # schedule step of each forward pass
    reveals: list[list[int]] = field(default_factory=list)  # positions revealed by each pass, ascending
    edits: int = 0
    remasks: int = 0

    @property
    def passes(self) -> int:
        return len(self.steps_run)


def even_blocks(masked: Sequence[bool], blocks: int) -> list[int]:
    """Block of each position: masked positions from left to right, evenly; -1 where given."""
    count, seen, out = sum(masked), 0, []
    for is_masked in masked:
        out.append(seen * blocks // count if is_masked else -1)
        seen += is_masked
    return out


def decode(
    logits_of: Callable[[Sequence[int], int], Sequence[Sequence[float]]],
    ids: Sequence[int],
    decoder: Stepwise,
    *,
    steps: int,
    mask_id: int,
    block: Sequence[int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    sample: int = 0,
    limit: int | None = None,
) -> Outcome:
    """Decode one sequence.

    Args:
        logits_of: logits by position of (ids, schedule step).
        ids: the mask id wherever text is wanted.
        steps: T; a multiple of the number of blocks.
        block: block of each masked position. None: one block.
        limit: passes of a block, if the decoder says when one is settled. None: as many as there are positions.

    The step that keys a draw is the step of the run, or, for an adaptive decoder, the number of the forward pass: its
    schedule step, the share of the text revealed, may be the same in two passes, which must not share their noise.
    """
    state = _Run(list(ids), mask_id, steps, seed, sample, temperature, decoder, limit or len(ids))
    block = block or [0 if token == mask_id else -1 for token in ids]
    for number in range(max(block) + 1):
        places = [i for i, token in enumerate(ids) if token == mask_id and block[i] == number]
        if places:
            state.run_block(places, number, steps // (max(block) + 1), logits_of)
    assert mask_id not in state.ids
    return Outcome(state.ids, state.reveal_step, state.steps_run, state.reveals, state.edits, state.remasks)


class _Run:
    def __init__(
        self,
        ids: list[int],
        mask_id: int,
        steps: int,
        seed: int,
        sample: int,
        temperature: float,
        decoder: Stepwise,
        limit: int,
    ) -> None:
        self.limit, self.settled = limit, False
        self.ids, self.mask_id, self.steps = ids, mask_id, steps
        self.seed, self.sample, self.temperature, self.decoder = torch.tensor(seed), sample, temperature, decoder
        self.total = ids.count(mask_id)
        self.confidence = [1.0] * len(ids)
        self.reveal_step = [-1] * len(ids)
        self.steps_run: list[int] = []
        self.reveals: list[list[int]] = []
        self.edits = self.remasks = 0

    def run_block(
        self,
        places: list[int],
        number: int,
        block_steps: int,
        logits_of: Callable[[Sequence[int], int], Sequence[Sequence[float]]],
    ) -> None:
        block_step = closing = 0
        settles = type(self.decoder).settled is not Stepwise.settled
        while True:
            done = all(self.ids[i] != self.mask_id for i in places)
            if self.decoder.adaptive:
                step = min(self.steps - 1, (self.total - self.ids.count(self.mask_id)) * self.steps // self.total)
                key_step = len(self.steps_run)
                if done and not settles and closing == self.decoder.closing_steps:
                    return
                closing += done
            else:
                step = key_step = number * block_steps + block_step
                if block_step == block_steps:
                    return
            key_step = key_step if self.decoder.fresh_noise else 0
            view = self.view(places, step, key_step, block_step, block_steps)
            changed = self.run_step(view, places, step, logits_of)
            block_step += 1
            left = sum(self.ids[i] == self.mask_id for i in places)
            if settles and not left and (self.settled or block_step >= self.limit):
                return
            if self.decoder.adaptive and not changed:
                if done:
                    return
                raise RuntimeError("an adaptive decoder revealed nothing")

    def view(self, places: list[int], step: int, key_step: int, block_step: int, block_steps: int) -> View:
        masked = [self.ids[i] == self.mask_id for i in places]
        if block_step == 0:
            self.block_masked = sum(masked)

        def row(values: Sequence[float | bool]) -> Tensor:
            return torch.tensor([list(values)])

        return View(
            ids=row([self.ids[i] for i in places]),
            masked=row(masked),
            revealed=row([not m for m in masked]),
            offset=row([i - places[0] for i in places]),
            step=torch.tensor([step]),
            steps=torch.tensor([self.steps]),
            block_step=torch.tensor([block_step]),
            block_steps=torch.tensor([block_steps]),
            block_masked=torch.tensor([self.block_masked]),
            confidence=row([self.confidence[i] for i in places]).float(),
            seed=self.seed,
            keys=torch.tensor([[[self.sample, i, key_step] for i in places]]),
        )

    def run_step(
        self,
        view: View,
        places: list[int],
        step: int,
        logits_of: Callable[[Sequence[int], int], Sequence[Sequence[float]]],
    ) -> bool:
        """One step; whether it changed anything."""
        remask = self.decoder.remask(view)
        wanted = self.decoder.rows(view)[0].tolist()
        changes: dict[int, tuple[int, float]] = {}
        if any(wanted):
            logits = logits_of(self.ids, step)
            proposal = self.propose(view, [logits[i] for i in places], wanted)
            revealed = chosen(self.decoder.choose(view, proposal), proposal.token, view.seed, view.keys)
            edited, settled = self.decoder.edit(view, proposal), self.decoder.settled(view, proposal)
            self.settled = settled is not None and bool(settled[0])
            edited_places = edited[0].nonzero()[:, 0].tolist() if edited is not None else []
            assert all(view.masked[0, r] for r in revealed)
            assert not any(view.masked[0, r] for r in edited_places)
            for r in [*revealed, *edited_places]:
                changes[places[r]] = int(proposal.token[0, r]), float(proposal.probability[0, r])
            self.steps_run.append(step)
            self.reveals.append([places[r] for r in revealed])
            self.edits += len(edited_places)
        for i, (token, probability) in changes.items():
            self.ids[i], self.confidence[i], self.reveal_step[i] = token, probability, step
        if remask is not None:
            for r in remask[0].nonzero()[:, 0].tolist():
                assert not view.masked[0, r]
                self.ids[places[r]] = self.mask_id
                self.remasks += 1
        return bool(changes)

    def propose(self, view: View, logits: Sequence[Sequence[float]], wanted: Sequence[bool]) -> Proposal:
        places = [r for r, is_wanted in enumerate(wanted) if is_wanted]
        rows = {r: reference.row_statistics(logits[r]) for r in places}
        tokens = {r: row.token for r, row in rows.items()}
        if self.temperature > 0.0:
            keys = view.keys[0, places]
            tokens = dict(zip(places, draw_tokens([logits[r] for r in places], self.temperature, view.seed, keys)))
        values = torch.full((4, 1, len(logits)), math.nan)
        for r, row in rows.items():
            probability = reference.softmax(logits[r])[tokens[r]]
            values[:, 0, r] = torch.tensor([probability, row.top1, row.top2, row.entropy], dtype=torch.float64)
        wants_top, wants_entropy = self.decoder.wants_top, self.decoder.wants_entropy
        return Proposal(
            torch.tensor([[tokens.get(r, -1) for r in range(len(logits))]]),
            values[0],
            values[1] if wants_top else None,
            values[2] if wants_top else None,
            values[3] if wants_entropy else None,
        )


def draw_tokens(rows: Sequence[Sequence[float]], temperature: float, seed: Tensor, keys: Tensor) -> list[int]:
    """`vocab_projection`'s draw: one Gumbel per group of 64 ids picks the group, one per id of it picks the token.

    Args:
        rows: logits of each row.
        keys: int64 ``[rows, 3]``.
    """
    scaled = torch.tensor(rows, dtype=torch.float64) / temperature
    groups = scaled.split(GROUP_SIZE, dim=1)
    sample, position, step = keys[:, :, None].unbind(1)

    def gumbels(count: int, domain: int) -> Tensor:
        return noise.gumbel(seed, sample, position, step, torch.arange(count), domain).double()

    of_group, of_token = gumbels(len(groups), noise.GROUP), gumbels(scaled.shape[1], noise.TOKEN)
    tokens = []
    for row in range(len(rows)):
        best = first_largest([float(group[row].logsumexp(0) + of_group[row, g]) for g, group in enumerate(groups)])
        within = (groups[best][row] + of_token[row].split(GROUP_SIZE)[best]).tolist()
        tokens.append(best * GROUP_SIZE + first_largest(within))
    return tokens


def first_largest(values: Sequence[float]) -> int:
    return values.index(max(values))


def chosen(choice: Choice, tokens: Tensor, seed: Tensor, keys: Tensor) -> list[int]:
    """The entries of a `Choice` for one sequence that are revealed, ascending: `mdkern.kernels.select`, by sorting."""
    able = [r for r in range(tokens.shape[1]) if choice.candidates[0, r] and tokens[0, r] >= 0]
    worth = choice.scores[0]
    if choice.temperature > 0.0:
        zero = torch.zeros((), dtype=torch.int64)
        sample, position, step = keys[0].unbind(-1)
        worth = worth / choice.temperature + noise.gumbel(seed, sample, position, step, zero, noise.POSITION)
    sign = -1.0 if choice.rule == "entropy_bound" else 1.0
    exact = {r: sign * float(worth[r]) for r in able}
    value = {r: sign * rounded for r, rounded in in_steps(exact).items()}
    order = sorted(able, key=lambda r: (-sign * value[r], r))
    if choice.rule == "top_k":
        assert choice.quota is not None
        return sorted(order[: int(choice.quota[0])])
    if choice.rule == "threshold":
        bound = float(torch.tensor(choice.bound))  # as a float32
        return sorted([r for r in order if exact[r] >= bound] or order[:1])
    length, spent = 0, 0
    limit = fixed_point(float(torch.tensor(choice.bound)))
    for n, r in enumerate(order, start=1):
        if choice.rule == "factor":
            if (n + 1) * (1.0 - value[r]) >= choice.bound:
                break
        else:  # all before it in multiples of 2^-32, which is the sum less the largest
            if spent > limit:
                break
            spent += fixed_point(value[r])
        length = n
    return sorted(order[: max(length, 1)])


def in_steps(exact: dict[int, float]) -> dict[int, float]:
    """Scores, the larger the better, in whole steps below the best, for which rounding is too small a difference."""
    best = max(exact.values(), default=0.0)
    step = 2.0**-16 * (1.0 if abs(best) < 1.0 else 2.0 ** math.floor(math.log2(abs(best))))
    origin = 0.0 if abs(best) < step / 2 else best
    return {r: origin - step * math.floor((best - value) / step + 0.5) for r, value in exact.items()}


def fixed_point(entropy: float) -> int:
    """`select`'s multiples of 2^-32."""
    return math.floor(min(entropy, 2.0**14) * 2.0**32 + 0.5)
