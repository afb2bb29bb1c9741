"""Decoders in a loop: what public loops are known to get wrong, and the slow loop that the sampler is held against."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mdkern.decoders import Edit, Entropy, EntropyBound, Factor, PositionAware, ReMDM, Threshold, TopProbability
from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.kernels import select
from mdkern.kernels.head.reference import row_statistics
from tests.problems.decoder_states import (
    STEPWISE,
    State,
    first_masked,
    one_row,
    propose,
    quota_view,
    random_state,
    reveal,
)
from tests.references import decoding_rules as reference
from tests.references.slow_sampler import Outcome, PairModel, chosen, decode, draw_tokens, even_blocks


def run(decoder: Stepwise, steps: int = 8, blocks: int = 1, **options: Any) -> Outcome:
    model = PairModel(16, 7, seed=options.pop("model", 0), sharpness=options.pop("sharpness", 2.0))
    ids = options.pop("ids", [3, 1, *[model.mask_id] * 14])
    block = even_blocks([token == model.mask_id for token in ids], blocks)
    return decode(model.of, ids, decoder, steps=steps, mask_id=model.mask_id, block=block, **options)


LOOPED: dict[str, Stepwise] = STEPWISE | {
    "position_aware": PositionAware(torch.full((7,), 1 / 7)),
    "edit": Edit(0.5, 0.2),
}


@pytest.mark.parametrize("name", LOOPED)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_mask_is_left_and_the_prompt_stays(name: str, blocks: int, temperature: float) -> None:
    for steps in (2, 24):
        outcome = run(LOOPED[name], steps, blocks, temperature=temperature)
        assert all(0 <= token < 7 for token in outcome.ids)
        assert outcome.ids[:2] == [3, 1]
        if not LOOPED[name].adaptive:
            assert outcome.passes <= steps
        if blocks == 2:
            in_first = [place < 9 for places in outcome.reveals for place in places]
            assert in_first == sorted(in_first, reverse=True), "the first block is finished before the second"


@pytest.mark.parametrize("name", STEPWISE)
def test_the_slow_loop_selects_as_select_does(name: str) -> None:
    decoder = STEPWISE[name]
    for trial in range(12):
        state = random_state(trial)
        proposal = propose(decoder, state)
        revealed = reveal(state, decoder.choose(state.view, proposal), proposal.token)
        for b in range(0, len(state.ids), 5):
            view, part = one_row(state.view, b), Proposal(*(None if x is None else x[b : b + 1] for x in proposal))
            places = chosen(decoder.choose(view, part), part.token, view.seed, view.keys)
            assert [int(state.start[b]) + r for r in places] == sorted(revealed[b])


def test_the_slow_loop_draws_as_vocab_projection_does() -> None:
    rows, vocab, temperature = 200, 150, 0.8
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator)
    keys = torch.randint(0, 1000, (rows, 3), generator=generator)
    token, _ = row_statistics(logits, torch.full((rows,), temperature), torch.tensor(3), keys)
    assert draw_tokens(logits.tolist(), temperature, torch.tensor(3), keys) == token.tolist()


def test_a_run_is_a_function_of_its_key() -> None:
    warm = {"temperature": 1.0, "decoder": ReMDM("cap", 0.3)}
    first = run(**warm)
    assert first.ids == run(**warm).ids
    assert first.ids != run(**warm, sample=1).ids
    assert first.ids != run(**warm, seed=1).ids


class TestKnownDefects:
    """What public code does, shown to happen on the same state, and that ours does not."""

    FLAT = 0.1  # sharpness of a model so unsure that an adaptive rule reveals one position a pass

    def test_an_adaptive_loop_is_not_cut_off_by_a_step_count(self) -> None:
        """Threshold rules run in `for step in range(steps)` leave masks once the steps are used up."""
        model, steps = PairModel(16, 7, sharpness=self.FLAT), 4
        ids = [model.mask_id] * 16
        for _ in range(steps):
            rows = [reference.row_statistics(row) for row in model.of(ids, 0)]
            found = reference.threshold(rows, [token == model.mask_id for token in ids], range(16), 0.9)
            ids = [found.get(i, token) for i, token in enumerate(ids)]
        assert ids.count(model.mask_id) == 12
        for decoder in (Threshold(), Factor(0.5), EntropyBound(0.01), Edit(0.9, 0.9, 0)):
            outcome = run(decoder, steps, sharpness=self.FLAT, ids=[model.mask_id] * 16)
            assert outcome.passes == 16
            assert max(outcome.steps_run) == steps - 1, "the schedule's last step stays the last"

    def test_the_block_is_applied_before_the_quota(self) -> None:
        """Top-k over all masks, then `& block`: surer positions further on eat up the quota."""
        state = random_state(3)
        logits = state.logits.clone()
        logits[..., 1] = torch.where(torch.arange(logits.shape[1]) >= 4, 20.0, 0.0)  # sure everywhere but at the start
        first = dataclasses.replace(
            quota_view(torch.ones(len(logits), 4, dtype=torch.bool), 0, 2),
            offset=torch.arange(4).expand(len(logits), 4),
        )
        rows = [reference.row_statistics(row) for row in logits[0].tolist()]
        careless = reference.top_probability(rows, [True] * len(rows), range(len(rows)), 2)
        assert not [i for i in careless if i < 4]
        only = State(logits, torch.zeros_like(state.ids), state.prompt, torch.zeros_like(state.start), first)
        proposal = propose(TopProbability(), only)
        for b, got in enumerate(reveal(only, TopProbability().choose(first, proposal), proposal.token)):
            rows = [reference.row_statistics(row) for row in logits[b].tolist()]
            assert got == reference.top_probability(rows, [True] * len(rows), range(4), 2)
            assert len(got) == 2

    def test_a_finished_text_does_not_stop_the_others(self) -> None:
        """`if not mask.any(): break` on one text of a batch, or a common count of steps, cuts the others short."""
        view = dataclasses.replace(quota_view(first_masked([0, 1, 6], 6), 3, 8), block_masked=torch.tensor([6, 6, 6]))
        proposal = Proposal(torch.ones(3, 6, dtype=torch.int64), torch.full((3, 6), 0.3), None, None, torch.ones(3, 6))
        for decoder in (TopProbability(), Entropy(quota="dream"), Threshold(), Factor(), EntropyBound(), Edit()):
            choice = decoder.choose(view, proposal)
            ids = torch.zeros(3, 6, dtype=torch.int64)
            options: dict[str, Any] = {"quota": choice.quota, "bound": choice.bound}
            written = select(choice.scores, choice.candidates, proposal.token, ids, choice.rule, **options)
            assert written.sum(-1).tolist() == [0, 1, 1], decoder

    def test_a_text_alone_in_its_length_takes_its_own_number_of_passes(self) -> None:
        easy, hard = (run(Threshold(0.6), sharpness=s).passes for s in (8.0, self.FLAT))
        assert easy < hard == 14

    @pytest.mark.parametrize("decoder", [Entropy(), EntropyBound(1.0)])
    def test_entropies_are_the_positions_own(self, decoder: Stepwise) -> None:
        """Summed over a text they say nothing of a position, and change with what is revealed or lies elsewhere."""
        for trial in range(20):
            state = random_state(trial)
            proposal = propose(decoder, state)
            noisy = proposal._replace(entropy=torch.where(state.view.masked, proposal.entropy, 50.0))
            want, got = (reveal(state, decoder.choose(state.view, p), p.token) for p in (proposal, noisy))
            assert want == got

    def test_a_draw_is_fresh_at_every_pass(self) -> None:
        """Passes of an adaptive decoder at the same schedule step share no noise: 14 masks in 1 step, 14 passes."""
        proposed: list[Tensor] = []

        class Recording(Threshold):
            def choose(self, view: View, proposal: Proposal) -> Choice:
                proposed.append(proposal.token[0])
                return super().choose(view, proposal)

        outcome = run(Recording(1.0), 1, sharpness=0.0, temperature=1.0)  # a model that knows nothing
        assert outcome.steps_run == [0] * 14
        for before, after in itertools.pairwise(proposed[:8]):
            both = (before >= 0) & (after >= 0)
            assert not torch.equal(before[both], after[both])


class TestEditLoop:
    def test_it_ends_when_a_closing_step_changes_nothing_or_after_its_closing_steps(self) -> None:
        model = PairModel(16, 7, sharpness=6.0)
        passes = {}
        for closing in (0, 1, 3, 16):
            outcome = run(Edit(0.5, 0.0, closing), sharpness=6.0)
            passes[closing] = outcome.passes
            rows = [reference.row_statistics(row) for row in model.of(outcome.ids, 0)]
            settled = all(rows[i].token == outcome.ids[i] for i in range(2, 16))
            assert settled or passes[closing] == passes[0] + closing
        assert passes[0] < passes[1] <= passes[3] <= passes[16] <= passes[0] + 16

    def test_edits_happen_and_an_edit_threshold_of_1_forbids_them(self) -> None:
        assert run(Edit(0.5, 0.0), sharpness=6.0).edits > 0
        assert run(Edit(0.5, 1.0), sharpness=6.0).edits == 0


def test_remasked_positions_are_decoded_again() -> None:
    outcome = run(ReMDM("cap", 0.5), steps=24, temperature=1.0)
    assert outcome.remasks > 0
    assert sum(map(len, outcome.reveals)) == 14 + outcome.remasks
