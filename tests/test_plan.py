"""The reveal plan: its law, and that its ticks run every event once, in order, in batches of few sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mdkern.plan import GIVEN, RevealPlan, pack, positions_in_text


def draw(masked: torch.Tensor, steps: int, eps: float = 1e-5, seed: int = 0) -> RevealPlan:
    alpha = 1 - torch.linspace(1, eps, steps + 1, dtype=torch.float64)
    sequences, length = masked.shape
    position = torch.arange(length).expand(sequences, length)
    return RevealPlan.draw(masked, alpha, torch.tensor(seed), torch.arange(sequences), position)


class TestLaw:
    def test_reveal_steps_are_uniform_and_eps_is_left_to_the_closing_pass(self) -> None:
        steps, eps = 10, 0.1
        plan = draw(torch.ones(2000, 100, dtype=torch.bool), steps, eps)
        counts = torch.bincount(plan.step.flatten(), minlength=steps + 1).double()
        share = torch.cat((torch.full((steps,), (1 - eps) / steps, dtype=torch.float64), torch.tensor([eps])))
        assert chisquare(counts.numpy(), (share * counts.sum()).numpy()).pvalue > 1e-3

    def test_it_is_the_step_by_step_law(self) -> None:
        """Revealing at each step with probability (t - s) / t gives the same distribution of steps."""
        steps, eps, count = 8, 0.05, 200_000
        times = torch.linspace(1, eps, steps + 1)
        generator = torch.Generator().manual_seed(1)
        step = torch.full((count,), steps)
        for i in reversed(range(steps)):
            revealed = torch.rand(count, generator=generator) < (times[i] - times[i + 1]) / times[i]
            step = torch.where(revealed, i, step)
        walked = torch.bincount(step, minlength=steps + 1)
        drawn = torch.bincount(draw(torch.ones(2000, 100, dtype=torch.bool), steps, eps).step.flatten(), minlength=9)
        both = walked + drawn
        statistic = float(((walked - drawn) ** 2 / both).sum())
        assert statistic < 8 + 5 * math.sqrt(2 * 8)

    def test_given_positions_have_no_step(self) -> None:
        masked = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.5
        assert torch.equal(draw(masked, 40).step == GIVEN, ~masked)

    def test_a_draw_depends_on_its_key_alone(self) -> None:
        whole = draw(torch.ones(6, 30, dtype=torch.bool), 50)
        part = draw(torch.ones(3, 30, dtype=torch.bool), 50)
        assert torch.equal(whole.step[:3], part.step)
        assert not torch.equal(whole.step, draw(torch.ones(6, 30, dtype=torch.bool), 50, seed=1).step)

    def test_mean_number_of_events(self) -> None:
        plan = draw(torch.ones(400, 256, dtype=torch.bool), 256)
        assert abs(float(plan.events().double().mean()) / (256 * (1 - (1 - 1 / 256) ** 256)) - 1) < 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 100])
@pytest.mark.parametrize("share", [1.0, 0.3])
class TestTicks:
    SEQUENCES, LENGTH, STEPS = 13, 24, 30

    def plan(self, share: float) -> RevealPlan:
        masked = torch.rand(self.SEQUENCES, self.LENGTH, generator=torch.Generator().manual_seed(2)) < share
        masked[4] = False  # a sequence with nothing to do
        return draw(masked, self.STEPS)

    def test_every_row_once_and_in_order(self, batch_size: int, share: float) -> None:
        plan = self.plan(share)
        for first, stop in ((0, self.STEPS + 1), (7, 20)):
            ticks = plan.ticks(first, stop, batch_size)
            assert ticks is not None
            revealed = torch.full_like(plan.step, -2)
            last_step = [-1] * self.SEQUENCES
            for tick, batch in enumerate(ticks.batch):
                assert 1 <= batch <= batch_size
                sequences = ticks.sequence[tick].tolist()
                assert sequences[batch:] == [self.SEQUENCES] * (len(sequences) - batch), "unused slots are scratch"
                assert len(set(sequences[:batch])) == batch, "a sequence is in a batch once"
                for slot, sequence in enumerate(sequences[:batch]):
                    step = int(ticks.step[tick, slot])
                    assert last_step[sequence] < step, "a sequence's events run in the order of their steps"
                    last_step[sequence] = step
                rows = ticks.row[tick, : ticks.rows[tick]]
                assert len(rows) == ticks.row_count[tick]
                width = ticks.position.shape[2]
                for row in rows.tolist():
                    sequence, position = sequences[row // width], int(ticks.position[tick, row // width, row % width])
                    assert revealed[sequence, position] == -2, "a position is revealed once"
                    revealed[sequence, position] = ticks.step[tick, row // width]
            inside = (plan.step >= first) & (plan.step < stop)
            assert torch.equal(revealed[inside], plan.step[inside])
            assert (revealed[~inside] == -2).all()

    def test_it_costs_its_events(self, batch_size: int, share: float) -> None:
        plan = self.plan(share)
        ticks = plan.ticks(0, self.STEPS + 1, batch_size)
        assert ticks is not None
        assert sum(ticks.batch) == int(plan.events().sum())


def random_counts(seed: int) -> list[int]:
    """Of events: alike, skewed, or few."""
    generator = torch.Generator().manual_seed(seed)
    sequences, most, power = (int(torch.randint(1, high, (), generator=generator)) for high in (21, 41, 6))
    counts = (most * torch.rand(sequences, generator=generator) ** power).round().long()
    counts[0] = most  # there is one at least
    return counts[torch.randperm(sequences, generator=generator)].tolist()


class TestPacking:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 16, 100])
    @pytest.mark.parametrize("seed", range(60))
    def test_ticks_have_two_sizes_and_few_idle_slots(self, seed: int, batch_size: int) -> None:
        counts = random_counts(seed)
        count = torch.tensor(counts)
        packing = pack(count, batch_size)
        fewest = max(math.ceil(sum(counts) / batch_size), max(counts))
        slots = packing.large * packing.full + packing.small * packing.rest
        assert 1 <= packing.small <= packing.large <= batch_size
        assert 0 <= slots - sum(counts) < packing.small
        assert fewest <= packing.full + packing.rest <= fewest * 17 / 16
        owner = torch.arange(len(counts)).repeat_interleave(count)
        tick, slot = packing.place(count, owner)
        size = torch.tensor([packing.large] * packing.full + [packing.small] * packing.rest)
        assert (slot < size[tick]).all()
        assert len(set(zip(tick.tolist(), slot.tolist()))) == sum(counts), "a slot runs one event"
        later, same = tick[1:] > tick[:-1], owner[1:] == owner[:-1]
        assert later[same].all(), "a sequence's events run in their order"
        used = torch.bincount(tick, minlength=len(size))
        assert (used[: packing.full] == packing.large).all(), "the first ticks are full"
        assert (used > 0).all(), "no tick is of scratch alone"
        assert (slot.new_zeros(len(size)).scatter_reduce(0, tick, slot + 1, "amax") == used).all(), "the first slots"

    @pytest.mark.parametrize(("sequences", "batch_size"), [(16, 16), (100, 16), (7, 16), (24, 16)])
    def test_most_ticks_are_full(self, sequences: int, batch_size: int) -> None:
        """Of sequences of like lengths; so runs of one batch size share their graphs."""
        count = draw(torch.ones(sequences, 1024, dtype=torch.bool), 1000).events()
        packing = pack(count, batch_size)
        assert packing.large == min(sequences, batch_size)
        assert packing.small == math.ceil(packing.large / 2)
        fewest = max(math.ceil(int(count.sum()) / batch_size), int(count.max()))
        assert packing.full > 0.9 * fewest
        assert packing.full + packing.rest < 1.03 * fewest
        assert packing.large * packing.full + packing.small * packing.rest - int(count.sum()) < packing.small


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.nbytes)
        return result


class TestCrowding:
    """Few events that reveal very many positions do not make room for as many in all the others."""

    SEQUENCES, LENGTH, STEPS = 40, 512, 256

    def crowded(self, where: str) -> RevealPlan:
        """A crowded closing pass, first step, or one of either kind in the midst of the others."""
        plan = draw(torch.ones(self.SEQUENCES, self.LENGTH, dtype=torch.bool), self.STEPS, eps=0.3)
        step = plan.step
        if where == "first":
            step = torch.where(step == self.STEPS, 0, step)
        if where == "between":
            step = torch.where(step == self.STEPS, torch.arange(self.SEQUENCES)[:, None] + 100, step)
        return replace(plan, step=step)

    @pytest.mark.parametrize("where", ["closing", "first", "between"])
    def test_room_is_in_proportion_to_what_is_revealed(self, where: str) -> None:
        plan = self.crowded(where)
        with Largest() as largest:
            parts = plan.by_crowding(0, self.STEPS + 1)
            ticks = [part.ticks(0, self.STEPS + 1, 16) for part in parts]
        sizes = [value.nbytes for part in ticks if part for value in vars(part).values() if isinstance(value, Tensor)]
        positions = 8 * self.SEQUENCES * self.LENGTH
        events = 8 * int(plan.events().sum())
        assert sum(sizes) < 8 * positions + 4 * events
        assert largest.most < 8 * positions
        with Largest() as together:
            plan.ticks(0, self.STEPS + 1, 16)
        assert together.most > 8 * largest.most

    @pytest.mark.parametrize("where", ["closing", "first", "between"])
    def test_every_event_is_run_once_and_in_order(self, where: str) -> None:
        plan = self.crowded(where)
        parts = plan.by_crowding(0, self.STEPS + 1)
        assert len(parts) > 1
        runs = torch.stack([part.step for part in parts])
        assert ((runs != GIVEN).sum(0) == 1).all()
        assert runs.amax(0).equal(plan.step)
        latest = torch.full((self.SEQUENCES,), GIVEN)
        for part in parts:
            earliest = torch.where(part.step == GIVEN, self.STEPS + 1, part.step).amin(-1)
            assert (earliest > latest).all()
            latest = torch.maximum(latest, part.step.amax(-1))
        assert sum(int(part.events().sum()) for part in parts) == int(plan.events().sum())

    def test_an_even_plan_stays_whole(self) -> None:
        plan = draw(torch.ones(40, 512, dtype=torch.bool), 256)
        assert plan.by_crowding(0, 257) == [plan]


def test_no_events_no_ticks() -> None:
    assert draw(torch.zeros(3, 5, dtype=torch.bool), 5).ticks(0, 6, 2) is None


def test_positions_are_counted_over_attended_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    positions = positions_in_text(mask)
    assert torch.equal(positions[0][2:], torch.arange(3))
    assert torch.equal(positions[1][:3], torch.arange(3))
