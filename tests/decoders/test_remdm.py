"""ReMDM: its rates are the paper's, and so is what they do to the share revealed."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from mdkern.decoders import ReMDM
from mdkern.decoders.base import Proposal
from mdkern.decoders.remdm import coins
from mdkern.kernels import select
from tests.problems.decoder_states import propose, quota_view, random_state, reveal
from tests.references import decoding_rules as reference


class TestReMDM:
    @pytest.mark.parametrize(
        ("kind", "eta"), [("cap", 0.008), ("cap", 1.0), ("rescale", 0.015), ("rescale", 0.9), ("conf", None),
                          ("loop", 0.02), ("loop", 0.5)],
    )  # fmt: skip
    def test_rates_are_the_papers_weights(self, kind: str, eta: float | None) -> None:
        decoder = ReMDM(kind, eta)
        for trial in range(30):
            view = random_state(trial).view
            revealed_rate, remask_rate = decoder.rates(view)
            for b in range(0, len(view.ids), 3):
                confidence = [
                    float(c) if revealed else None for c, revealed in zip(view.confidence[b], view.revealed[b])
                ]
                weights = reference.remdm(kind, int(view.block_step[b]), int(view.block_steps[b]), confidence, eta)
                for r, weight in enumerate(weights):
                    assert math.isclose(weight.revealed + weight.stays, 1.0, abs_tol=1e-12)
                    assert 0.0 <= weight.revealed <= 1.0 + 1e-12
                    if view.masked[b, r]:
                        assert math.isclose(float(revealed_rate[b, r]), weight.revealed, abs_tol=1e-12)
                    if view.revealed[b, r]:
                        assert math.isclose(float(remask_rate[b, r]), weight.remasked, abs_tol=1e-12)

    def walk(self, decoder: ReMDM, steps: int, sequences: int = 1500, width: int = 16) -> list[tuple[Tensor, Tensor]]:
        """(masked, confidence) before each step and after the last, of texts decoded by the decoder's coins."""
        masked = torch.ones(sequences, width, dtype=torch.bool)
        confidence = torch.rand(sequences, width, generator=torch.Generator().manual_seed(3))
        place = torch.arange(width).expand(sequences, width)
        sample = torch.arange(sequences)[:, None].expand(sequences, width)
        out = [(masked, confidence)]
        for step in range(steps):
            keys = torch.stack((sample, place, torch.full_like(place, step)), -1)
            view = dataclasses.replace(quota_view(masked, step, steps), keys=keys, confidence=confidence)
            proposal = Proposal(torch.ones_like(place), confidence)
            choice = decoder.choose(view, proposal)
            revealed = select(
                choice.scores, choice.candidates, proposal.token, torch.zeros_like(place), choice.rule,
                quota=choice.quota,
            )  # fmt: skip
            remasked = decoder.remask(view)
            masked = (masked & ~revealed) | remasked
            out.append((masked, confidence))
        return out

    @pytest.mark.parametrize("kind", ["cap", "rescale", "loop"])
    def test_remasking_leaves_alpha_what_it_was(self, kind: str) -> None:
        """Theorem of the paper: the share revealed at time t is alpha_t whatever sigma."""
        steps, decoder = 20, ReMDM(kind, 0.4)
        for step, (masked, _) in enumerate(self.walk(decoder, steps)):
            alpha = float(decoder.alpha(torch.tensor(1.0 - step / steps, dtype=torch.float64)))
            deviation = (masked.numel() * alpha * (1 - alpha)) ** 0.5
            assert abs(int((~masked).sum()) - masked.numel() * alpha) <= 4.5 * deviation + 1e-6

    @pytest.mark.parametrize("kind", ["cap", "rescale", "loop", "conf"])
    def test_transitions_have_their_rates(self, kind: str) -> None:
        """Counts of reveals and of remasks at each step, against the weights."""
        steps, eta = 10, None if kind == "conf" else 0.4
        walk, remasks = self.walk(ReMDM(kind, eta), steps), 0
        for step, ((before, confidence), (after, _)) in enumerate(itertools.pairwise(walk)):
            reveal_mean = reveal_variance = remask_mean = remask_variance = 0.0
            for masks, given in zip(before.tolist()[:400], confidence.tolist()):
                weights = reference.remdm(kind, step, steps, [None if m else c for m, c in zip(masks, given)], eta)
                for is_masked, weight in zip(masks, weights):
                    reveal_mean += weight.revealed * is_masked
                    reveal_variance += weight.revealed * (1 - weight.revealed) * is_masked
                    remask_mean += weight.remasked * (not is_masked)
                    remask_variance += weight.remasked * (1 - weight.remasked) * (not is_masked)
            reveals = int((before & ~after)[:400].sum())
            put_back = int((~before & after)[:400].sum())
            remasks += put_back
            assert abs(reveals - reveal_mean) <= 4.5 * reveal_variance**0.5 + 1e-6
            assert abs(put_back - remask_mean) <= 4.5 * remask_variance**0.5 + 1e-6
        assert remasks > 50
        assert not walk[-1][0].any(), "the last step reveals all"

    def test_the_loop_only_remasks_while_it_holds(self) -> None:
        decoder, steps, held = ReMDM("loop"), 500, []
        for step in range(steps):
            reveal_rate, remask_rate = decoder.rates(quota_view(torch.tensor([[True, False]]), step, steps))
            weights = reference.remdm("loop", step, steps, [None, 1.0], 0.02)
            assert math.isclose(float(reveal_rate[0, 0]), weights[0].revealed, abs_tol=1e-12)
            assert float(remask_rate[0, 1]) == weights[1].remasked
            held += [1 - step / steps] if weights[1].remasked else []
        assert (max(held), min(held)) == pytest.approx((0.55, 0.052), abs=2e-3)

    def test_coins_are_uniform_and_independent(self) -> None:
        draws = 20_000
        view = quota_view(torch.ones(draws, 2, dtype=torch.bool), 0, 2)
        sample = torch.arange(draws)[:, None].expand(draws, 2)
        keys = torch.stack((sample, torch.arange(2).expand(draws, 2), torch.zeros_like(sample)), -1)
        u = coins(dataclasses.replace(view, keys=keys))
        cells = (u * 4).long() @ torch.tensor([4, 1])
        assert stats.chisquare(torch.bincount(cells, minlength=16).numpy()).pvalue > 1e-3

    def test_statistics_are_asked_for_only_where_a_token_is_written(self) -> None:
        decoder, asked, revealed = ReMDM(), 0, 0
        for trial in range(20):
            state = random_state(trial)
            proposal = propose(decoder, state)
            asked += int(decoder.rows(state.view).sum())
            revealed += sum(map(len, reveal(state, decoder.choose(state.view, proposal), proposal.token)))
        assert asked == revealed > 0
