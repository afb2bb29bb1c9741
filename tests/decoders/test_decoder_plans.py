"""Decoders whose order ignores the model: exact draws from the law that the papers walk step by step."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mdkern.decoders import Ancestral, FirstHitting, GenMD4, Hyperschedule, RandomRemask
from mdkern.decoders.base import Canvas, Planned
from mdkern.plan import GIVEN, RevealPlan
from tests.references import decoding_rules as reference
from tests.references.slow_sampler import even_blocks


def canvas_of(
    masked: Tensor, steps: int, blocks: int = 1, seed: int = 0, block: Tensor | None = None, first: int = 0
) -> Canvas:
    sequences, length = masked.shape
    if block is None:
        block = torch.tensor([even_blocks(row, blocks) for row in masked.tolist()]).clamp(min=0)
    return Canvas(
        masked=masked,
        block=block,
        blocks=torch.full((sequences, 1), blocks),
        steps=torch.full((sequences, 1), steps),
        seed=torch.tensor(seed),
        sample=torch.arange(first, first + sequences),
        position=torch.arange(length).expand(sequences, length),
    )


def all_masked(sequences: int, length: int) -> Tensor:
    return torch.ones(sequences, length, dtype=torch.bool)


def fits(steps: Tensor, law: list[float]) -> bool:
    """Whether reveal steps have this law: chi-square over the steps that can be, none at those that cannot."""
    counts = torch.bincount(steps.flatten(), minlength=len(law)).double().numpy()
    expected = np.array(law) * counts.sum()
    possible = expected > 1e-6
    if counts[~possible].any():
        return False
    counts, expected = counts[possible], expected[possible]
    return len(counts) == 1 or bool(stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3)


PLANNED: dict[str, Planned] = {
    "ancestral": Ancestral(0.1),
    "ancestral cosine": Ancestral(alpha="cosine"),
    "ancestral cosine grid": Ancestral(grid="cosine"),
    "first_hitting": FirstHitting(),
    "random": RandomRemask(),
    **{f"hyperschedule {kind}": Hyperschedule(kind) for kind in ("flat", "quenched")},
    **{f"hyperschedule {kind}": Hyperschedule(kind, 3) for kind in ("block", "sliding")},
    "genmd4": GenMD4(torch.linspace(0.3, 3.0, 40)),
}


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("blocks", [1, 4])
class TestPlans:
    def masked(self) -> Tensor:
        masked = torch.rand(9, 24, generator=torch.Generator().manual_seed(4)) < 0.6
        masked[0] = True
        masked[1] = torch.arange(24) == 5
        return masked

    def test_every_mask_has_a_step_of_its_block(self, name: str, blocks: int) -> None:
        canvas = canvas_of(self.masked(), 12, blocks)
        plan = PLANNED[name].plan(canvas)
        assert (plan.steps == 12).all()
        assert plan.step.dtype == torch.int64
        assert torch.equal(plan.step == GIVEN, ~canvas.masked)
        steps = plan.step[canvas.masked]
        assert int(steps.max()) < 12 or (name == "ancestral" and blocks == 1 and int(steps.max()) == 12)
        if blocks > 1:
            assert torch.equal(steps // 3, canvas.block[canvas.masked])

    def test_a_draw_depends_on_its_key_alone(self, name: str, blocks: int) -> None:
        masked, decoder = self.masked(), PLANNED[name]
        whole = decoder.plan(canvas_of(masked, 12, blocks)).step
        assert torch.equal(whole[3:5], decoder.plan(canvas_of(masked[3:5], 12, blocks, first=3)).step)
        again = decoder.plan(canvas_of(masked, 12, blocks, seed=1)).step
        assert not torch.equal(whole, again) or (name == "hyperschedule quenched" and blocks == 1)

    def test_padding_does_not_matter(self, name: str, blocks: int) -> None:
        """The same text with four positions of padding before it."""
        canvas = canvas_of(self.masked(), 12, blocks)
        padded = dataclasses.replace(
            canvas,
            masked=torch.nn.functional.pad(canvas.masked, (4, 0)),
            block=torch.nn.functional.pad(canvas.block, (4, 0)),
            position=torch.nn.functional.pad(canvas.position, (4, 0)),
        )
        plan, with_padding = (PLANNED[name].plan(c) for c in (canvas, padded))
        assert torch.equal(plan.step, with_padding.step[:, 4:])
        assert plan.order is None or torch.equal(plan.order, with_padding.order[:, 4:])


class TestAncestral:
    STEPS = 8

    def law(self, alpha: Callable[[float], float], eps: float, steps: int = STEPS) -> list[float]:
        levels = [1 - alpha(1 - (1 - eps) * i / steps) for i in range(steps + 1)]
        return reference.chain_law(levels)

    @pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
    def test_linear_and_cosine(self, eps: float) -> None:
        canvas = canvas_of(all_masked(1000, 60), self.STEPS)
        linear, cosine = (Ancestral(eps, alpha).plan(canvas).step for alpha in ("linear", "cosine"))
        assert fits(linear, self.law(lambda t: 1 - t, eps))
        assert fits(cosine, self.law(lambda t: 1 - math.cos(math.pi / 2 * (1 - t)), eps))
        assert not fits(cosine, self.law(lambda t: 1 - t, eps))

    @pytest.mark.parametrize("eps", [0.0, 0.1])
    def test_cosine_grid(self, eps: float) -> None:
        """MD4's code: the chain with alpha = 1 - t at the times ``cos(pi / 2 (1 - t))``, which a model is given."""
        times = [math.cos(math.pi / 2 * (1 - eps) * i / self.STEPS) for i in range(self.STEPS + 1)]
        decoder = Ancestral(eps, grid="cosine")
        assert decoder.times(self.STEPS).tolist() == pytest.approx(times)
        step = decoder.plan(canvas_of(all_masked(1000, 60), self.STEPS)).step
        assert fits(step, reference.chain_law(times))
        assert not fits(step, self.law(lambda t: 1 - t, eps))

    def test_a_function_whose_alpha_does_not_start_at_0(self) -> None:
        """The law is that of the chain, which starts all masked whatever alpha_1 is."""
        plan = Ancestral(0.05, lambda t: 0.2 + 0.7 * (1 - t) ** 2).plan(canvas_of(all_masked(1000, 60), self.STEPS))
        assert fits(plan.step, self.law(lambda t: 0.2 + 0.7 * (1 - t) ** 2, 0.05))

    def test_blocks_reveal_what_eps_leaves_over_at_their_last_step(self) -> None:
        plan = Ancestral(0.2).plan(canvas_of(all_masked(1000, 60), 12, 3))
        law = self.law(lambda t: 1 - t, 0.2, steps=4)
        in_block = [*law[:3], law[3] + law[4]]
        for block in range(3):
            assert fits(plan.step[:, 20 * block : 20 * block + 20] - 4 * block, in_block)

    def test_without_a_closing_pass_the_last_step_reveals_what_is_left(self) -> None:
        plan = Ancestral(0.2, closing_pass=False).plan(canvas_of(all_masked(1000, 60), self.STEPS))
        law = self.law(lambda t: 1 - t, 0.2)
        assert fits(plan.step, [*law[:-2], law[-2] + law[-1]])

    def test_without_blocks_it_is_the_plan_of_before(self) -> None:
        canvas, decoder = canvas_of(all_masked(20, 30), 16), Ancestral(1e-5)
        alpha = 1 - torch.linspace(1.0, 1e-5, 17, dtype=torch.float64)
        drawn = RevealPlan.draw(canvas.masked, alpha, canvas.seed, canvas.sample, canvas.position)
        assert torch.equal(decoder.plan(canvas).step, drawn.step)
        assert torch.equal(decoder.alpha(decoder.times(16)), alpha)


class TestFirstHitting:
    def test_it_is_the_recursion(self) -> None:
        """Times by rank, and which position comes when, against 6,000 runs of t <- t u^(1/n)."""
        count, runs, rng = 4, 6000, random.Random(5)
        plan = FirstHitting().plan(canvas_of(all_masked(runs, count), 10))
        assert plan.order is not None
        assert plan.time is not None
        assert torch.equal(plan.order.sort(-1).values, torch.arange(count).expand(runs, count))
        walked = [reference.first_hitting(count, rng) for _ in range(runs)]
        ranked = plan.time.gather(1, plan.order.argsort(-1))
        for rank in range(count):
            times = [hits[rank][0] for hits in walked]
            assert stats.ks_2samp(ranked[:, rank].numpy(), times).pvalue > 1e-3
        for rank in range(1, count):  # the ratio of successive times is independent of what was before
            ratios = [hits[rank][0] / hits[rank - 1][0] for hits in walked]
            ours = ranked[:, rank] / ranked[:, rank - 1]
            assert stats.ks_2samp(ours.numpy(), ratios).pvalue > 1e-3
            assert abs(float(torch.corrcoef(torch.stack((ours, ranked[:, rank - 1])))[0, 1])) < 4.5 / runs**0.5
        orders = torch.bincount(plan.order @ torch.tensor([64, 16, 4, 1]), minlength=256)
        assert stats.chisquare(orders[orders > 0].numpy()).pvalue > 1e-3
        assert int((orders > 0).sum()) == math.factorial(count)

    @pytest.mark.parametrize("blocks", [1, 3])
    def test_steps_orders_and_times_agree(self, blocks: int) -> None:
        masked = torch.rand(200, 30, generator=torch.Generator().manual_seed(1)) < 0.7
        plan = FirstHitting().plan(canvas_of(masked, 12, blocks))
        assert plan.order is not None
        assert plan.time is not None
        for steps, order, time, here in zip(plan.step, plan.order, plan.time, masked):
            steps, order, time = steps[here], order[here], time[here]
            by_order = order.argsort()
            assert torch.equal(order[by_order], torch.arange(len(order)))
            assert (steps[by_order].diff() >= 0).all()
            assert (time[by_order].diff() < 0).all()
            assert ((time > 0) & (time <= 1)).all()
            assert ((1 - time) * 12 - steps >= -1e-4).all()
            assert ((1 - time) * 12 - steps <= 1 + 1e-4).all()

    def test_in_steps_it_is_ancestral(self) -> None:
        canvas = canvas_of(all_masked(1000, 60), 8)
        assert fits(FirstHitting().plan(canvas).step, reference.chain_law([1 - i / 8 for i in range(9)]))


class TestRandomRemask:
    @pytest.mark.parametrize(("steps", "blocks"), [(1, 1), (5, 1), (24, 1), (60, 1), (12, 4)])
    def test_quotas_are_lladas(self, steps: int, blocks: int) -> None:
        canvas = canvas_of(torch.rand(30, 24, generator=torch.Generator().manual_seed(0)) < 0.7, steps, blocks)
        plan, block_steps = RandomRemask().plan(canvas), steps // blocks
        for b in range(30):
            for block in range(blocks):
                mine = plan.step[b, canvas.masked[b] & (canvas.block[b] == block)] - block * block_steps
                counts = torch.bincount(mine, minlength=block_steps).tolist()
                assert counts == reference.llada_quotas(len(mine), block_steps)

    def test_the_order_is_uniform(self) -> None:
        """Five positions in steps of 2, 2 and 1: all 30 outcomes alike, ours and the walk of LLaDA's loop."""
        runs, rng, base = 9000, random.Random(2), torch.tensor([81, 27, 9, 3, 1])
        drawn = RandomRemask().plan(canvas_of(all_masked(runs, 5), 3)).step @ base
        walked = torch.tensor([reference.random_remasking(5, 3, rng) for _ in range(runs)]) @ base
        for outcomes in (drawn, walked):
            counts = torch.bincount(outcomes, minlength=243)
            assert int((counts > 0).sum()) == 30
            assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-3


class TestHyperschedule:
    @pytest.mark.parametrize(("kind", "width"), [("flat", 1), ("quenched", 1), ("block", 4), ("sliding", 4)])
    @pytest.mark.parametrize("steps", [5, 10, 23])
    def test_each_position_has_the_law_of_its_level(self, kind: str, width: int, steps: int) -> None:
        """Positions are counted over the masks, so a prompt in between takes no time."""
        decoder = Hyperschedule(kind, width if kind in ("block", "sliding") else None)
        masked = torch.tensor([False, True, True, False, *[True] * 8, False])
        plan = decoder.plan(canvas_of(masked.expand(1500, -1), steps))
        level = reference.hyperschedule_level(kind, width)
        for number, place in enumerate(masked.nonzero()[:, 0].tolist()):
            law = reference.chain_law([level(1 - i / steps, number, 10) for i in range(steps + 1)])
            assert fits(plan.step[:, place], law), (number, law)

    def test_quenched_is_autoregressive(self) -> None:
        plan = Hyperschedule("quenched").plan(canvas_of(all_masked(50, 12), 12))
        assert torch.equal(plan.step, torch.arange(12).expand(50, 12))

    def test_width_1_is_quenched_and_a_block_of_all_is_flat(self) -> None:
        canvas = canvas_of(all_masked(20, 12), 9)
        steps = {
            (kind, width): Hyperschedule(kind, width).plan(canvas).step
            for kind, width in (("flat", None), ("quenched", None), ("block", 1), ("block", 12), ("sliding", 1))
        }
        assert torch.equal(steps["block", 12], steps["flat", None])
        assert torch.equal(steps["sliding", 1], steps["quenched", None])
        assert torch.equal(steps["block", 1], steps["quenched", None])

    def test_a_function_of_the_users(self) -> None:
        def level(time: Tensor, position: Tensor, length: Tensor) -> Tensor:
            return time ** (1.0 + position / length)

        plan = Hyperschedule(level).plan(canvas_of(all_masked(2000, 3), 6))
        for i in range(3):
            assert fits(plan.step[:, i], reference.chain_law([(1 - j / 6) ** (1 + i / 3) for j in range(7)]))

    @pytest.mark.parametrize(
        "level",
        [
            lambda t, i, n: t * 0.9 + 0 * i,
            lambda t, i, n: 0.1 + t * 0.9 + 0 * i,
            lambda t, i, n: (1 - t) * t * 4 + t.floor() + 0 * i,
            lambda t, i, n: t * math.nan + 0 * i,
        ],
    )
    def test_a_level_that_is_none_is_refused(self, level: Any) -> None:
        with pytest.raises(ValueError, match="level must fall from 1"):
            Hyperschedule(level).plan(canvas_of(all_masked(2, 3), 6))


class TestGenMD4:
    @pytest.mark.parametrize("steps", [4, 9])
    def test_each_position_has_the_law_of_its_exponent(self, steps: int) -> None:
        exponents = [0.2, 1.0, 1.7, 6.0]
        plan = GenMD4(torch.tensor(exponents)).plan(canvas_of(all_masked(5000, 4), steps))
        for i, w in enumerate(torch.tensor(exponents).tolist()):
            assert fits(plan.step[:, i], reference.chain_law([(1 - j / steps) ** w for j in range(steps + 1)]))

    def test_one_exponent_of_1_is_first_hittings_steps(self) -> None:
        canvas = canvas_of(all_masked(50, 20), 10)
        assert torch.equal(GenMD4(1.0).plan(canvas).step, FirstHitting().plan(canvas).step)

    def test_too_few_exponents_are_refused(self) -> None:
        with pytest.raises(ValueError, match="exponents must be at least 4"):
            GenMD4(torch.ones(3)).plan(canvas_of(all_masked(2, 4), 5))
