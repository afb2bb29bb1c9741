"""Decoders that look at the model against the published rules, position by position; quotas, names, parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import mdkern
from mdkern import decoders
from mdkern.decoders import (
    DECODERS,
    Ancestral,
    DreamQuota,
    Edit,
    Entropy,
    EntropyBound,
    Factor,
    GenMD4,
    Hyperschedule,
    Learned,
    Margin,
    PositionAware,
    ReMDM,
    SoftParallel,
    Threshold,
    TopProbability,
    by_name,
    dream_quota,
    even_quota,
    reference_frequencies,
)
from mdkern.decoders.base import Planned, Proposal, Stepwise
from mdkern.kernels import select
from tests.problems.decoder_states import (
    FREQUENCY,
    MASK,
    STEPWISE,
    VOCAB,
    State,
    block_of,
    exact_statistics,
    first_masked,
    one_row,
    propose,
    quota_view,
    random_state,
    reveal,
    rows_of,
)
from tests.references import decoding_rules as reference
from tests.references.slow_sampler import chosen


def expected_quota(state: State, b: int, quota: str) -> int:
    """What the papers' quotas come to in one text; where they say 0, 1."""
    view, step, steps = state.view, int(state.view.block_step[b]), int(state.view.block_steps[b])
    left = int(view.masked[b].sum())
    if step == steps - 1:
        return left
    if quota == "dream":
        return max(1, reference.dream_quota(left, step, steps))
    return max(1, reference.llada_quotas(int(view.block_masked[b]), steps)[step])


def check_reveals(decoder: Stepwise, case: reference.Case, tied: bool, trials: int = 40) -> None:
    """24 texts each: with equal scores, one mask, all masked, more quota than masks, blocks anywhere."""
    for trial in range(trials):
        state = random_state(trial, tied=tied)
        proposal = propose(decoder, state, exact_statistics(trial, tied) if tied else None)
        revealed = reveal(state, decoder.choose(state.view, proposal), proposal.token)
        for b, got in enumerate(revealed):
            quota = () if case.quota is None else (expected_quota(state, b, case.quota),)
            masked = (state.ids[b] == MASK).tolist()
            want = case.rule(rows_of(trial, tied, b), masked, block_of(state, b), *quota, *case.options)
            assert got == want, (trial, b)


@pytest.mark.parametrize("name", reference.CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_reveals_are_those_of_the_published_rule(name: str, tied: bool) -> None:
    check_reveals(STEPWISE[name], reference.CASES[name], tied)


def test_every_decoder_that_looks_at_the_model_has_a_published_rule() -> None:
    stepwise = {name for name, kind in DECODERS.items() if issubclass(kind, Stepwise)}
    by_themselves = {"edit", "remdm", "learned"}
    assert stepwise == {case.decoder for case in reference.CASES.values()} | by_themselves


@pytest.mark.parametrize("tied", [False, True])
def test_edits_are_those_of_the_published_rule(tied: bool) -> None:
    decoder = Edit(0.7, 0.4)
    for trial in range(40):
        state = random_state(trial, tied=tied)
        proposal = propose(decoder, state, exact_statistics(trial, tied) if tied else None)
        revealed = reveal(state, decoder.choose(state.view, proposal), proposal.token)
        edited = decoder.edit(state.view, proposal)
        for b, got in enumerate(revealed):
            rows, masked = rows_of(trial, tied, b), state.ids[b] == MASK
            want = reference.edit(
                rows, state.ids[b].tolist(), masked.tolist(), (~masked & ~state.prompt[b]).tolist(),
                block_of(state, b), 0.7, 0.4,
            )  # fmt: skip
            places = [int(state.start[b]) + r for r in edited[b].nonzero()[:, 0].tolist()]
            edits = {i: int(proposal.token[b, i - int(state.start[b])]) for i in places}
            assert (got, edits) == want, (trial, b)


@pytest.mark.parametrize("tied", [False, True])
def test_revisions_and_ends_of_blocks_are_those_of_dmax(tied: bool) -> None:
    decoder, settled = SoftParallel(0.4, 0.35), set()
    for trial in range(60):
        state = random_state(trial, tied=tied)
        proposal = propose(decoder, state, exact_statistics(trial, tied) if tied else None)
        edited, over = decoder.edit(state.view, proposal), decoder.settled(state.view, proposal)
        for b in range(len(state.ids)):
            rows, masked, ours = rows_of(trial, tied, b), state.ids[b] == MASK, ~state.prompt[b]
            want = reference.revisions(rows, state.ids[b].tolist(), (ours & ~masked).tolist(), block_of(state, b))
            first = int(state.start[b])
            got = {first + r: int(proposal.token[b, r]) for r in edited[b].nonzero()[:, 0].tolist()}
            assert got == want, (trial, b)
            assert bool(over[b]) == reference.is_settled(rows, ours.tolist(), block_of(state, b), 0.35), (trial, b)
            settled.add(bool(over[b]))
    assert settled == {True, False}


def test_thresholds_at_their_ends() -> None:
    """At least for Fast-dLLM, above for LLaDA 2.1."""
    half = torch.tensor([[0.5, 0.25, 0.75]])
    state = random_state(0, batch=8)
    masked = torch.ones(1, 3, dtype=torch.bool)
    view = dataclasses.replace(state.view, masked=masked, revealed=~masked)
    proposal = Proposal(torch.ones(1, 3, dtype=torch.int64), half, entropy=half)

    def reveals(decoder: Stepwise) -> list[int]:
        return chosen(decoder.choose(view, proposal), proposal.token, view.seed, view.keys)

    assert reveals(Threshold(0.5)) == [0, 2]
    assert reveals(SoftParallel(0.5)) == [0]
    assert reveals(SoftParallel(0.25)) == [0, 1, 2]
    assert SoftParallel(confident=0.25).settled(view, proposal)[0]
    assert not SoftParallel(confident=0.26).settled(view, proposal)[0]
    assert reveals(Edit(0.5)) == [2]
    assert reveals(Threshold(1.0)) == [2]
    assert reveals(Threshold(0.0)) == reveals(EntropyBound(math.inf)) == [0, 1, 2]
    assert reveals(Factor(0.0)) == [2]
    assert reveals(EntropyBound(0.0)) == [1]
    assert reveals(EntropyBound(0.25)) == [0, 1]


def test_position_aware_scores_do_not_underflow() -> None:
    """At 700 and more positions from the block's start ``exp(-i / 2)`` is far below what float32 holds."""
    length, first, quota = 800, 700, 40
    generator = torch.Generator().manual_seed(0)
    masked = torch.arange(length)[None] >= first
    probability, token = (
        torch.rand(1, length, generator=generator),
        torch.randint(VOCAB, (1, length), generator=generator),
    )
    view = dataclasses.replace(quota_view(masked, 0, 2, torch.tensor([2 * quota])), offset=torch.arange(length)[None])
    choice = PositionAware(FREQUENCY, lam=0.5).choose(view, Proposal(token, probability))
    rows = [reference.Row(t, p, p, 0.0, 0.0) for t, p in zip(token[0].tolist(), probability[0].tolist())]
    want = reference.position_aware(rows, masked[0].tolist(), range(length), quota, FREQUENCY.tolist(), 0.5, 10.0)
    assert chosen(choice, token, view.seed, view.keys) == sorted(want)


@pytest.mark.parametrize("name", STEPWISE)
def test_each_sequence_is_decided_on_its_own(name: str) -> None:
    """No flag, mean or sum over the batch: a batch of texts is decided as each of them alone."""
    decoder = STEPWISE[name]
    for trial in range(12):
        state = random_state(trial)
        proposal = propose(decoder, state)
        together = [
            reveal(state, decoder.choose(state.view, proposal), proposal.token),
            decoder.edit(state.view, proposal),
            decoder.remask(state.view),
        ]
        for b in range(0, len(state.ids), 5):
            alone = State(*(x[b : b + 1] for x in state[:4]), one_row(state.view, b))
            part = Proposal(*(None if x is None else x[b : b + 1] for x in proposal))
            assert reveal(alone, decoder.choose(alone.view, part), part.token)[0] == together[0][b]
            for whole, single in zip(together[1:], (decoder.edit(alone.view, part), decoder.remask(alone.view))):
                assert (whole is None) == (single is None)
                assert whole is None or torch.equal(whole[b], single[0])


@pytest.mark.parametrize("name", STEPWISE)
def test_only_masks_are_revealed_and_only_what_was_revealed_changes(name: str) -> None:
    decoder = STEPWISE[name]
    for trial in range(20):
        state = random_state(trial)
        proposal = propose(decoder, state)
        rows = decoder.rows(state.view)
        choice = decoder.choose(state.view, proposal)
        assert not (choice.candidates & ~state.view.masked).any()
        assert not (choice.candidates & ~rows).any(), "no token without statistics"
        for change in (decoder.edit(state.view, proposal), decoder.remask(state.view)):
            assert change is None or not (change & ~state.view.revealed).any(), "neither prompt nor mask"


class TestQuotas:
    WIDTH = 40

    @pytest.mark.parametrize("steps", [1, 3, 8, 40, 64])
    @pytest.mark.parametrize("quota", [even_quota, dream_quota])
    def test_every_mask_is_revealed_within_the_steps_and_no_step_idles(self, quota: Any, steps: int) -> None:
        counts = [1, 2, 7, 39, 40]
        left, whole = torch.tensor(counts), torch.tensor(counts)
        for step in range(steps):
            quotas = quota(quota_view(first_masked(left.tolist(), self.WIDTH), step, steps, whole))
            assert (quotas[left > 0] >= 1).all()
            left = (left - quotas).clamp(min=0)
        assert (left == 0).all()

    @pytest.mark.parametrize("steps", [1, 3, 8, 40, 64])
    def test_even_is_lladas(self, steps: int) -> None:
        counts = [1, 2, 7, 39, 40]
        masked = first_masked(counts, self.WIDTH)
        for step in range(steps - 1):
            got = even_quota(quota_view(masked, step, steps)).tolist()
            assert got == [max(1, reference.llada_quotas(count, steps)[step]) for count in counts]
        assert even_quota(quota_view(masked, steps - 1, steps)).tolist() == counts, "the last step takes what is left"

    @pytest.mark.parametrize("steps", [1, 3, 8, 40, 64])
    def test_dream_is_dreams_except_for_its_zeros(self, steps: int) -> None:
        counts = list(range(1, self.WIDTH + 1))
        masked, zeros = first_masked(counts, self.WIDTH), 0
        for step in range(steps):
            want = [reference.dream_quota(count, step, steps) for count in counts]
            zeros += want.count(0)
            assert dream_quota(quota_view(masked, step, steps)).tolist() == [max(1, quota) for quota in want]
        assert steps == 1 or zeros > 0, "Dream's rule would have idled"

    @pytest.mark.parametrize("eps", [1e-3, 0.05])
    @pytest.mark.parametrize("steps", [1, 2, 6, 9, 27, 64])
    def test_dream_with_zeros_rounds_as_dreams_code(self, steps: int, eps: float) -> None:
        """int(masked (1 - s / t)) in float32, for times of `torch.linspace`; of 999 masks that is a whole number at
        times, where exact fractions and float32 may differ."""
        counts = [1, 2, 37, 334, 446, 668, 963, 999]
        times, masked = torch.linspace(1, eps, steps + 1), first_masked(counts, 1000)
        for step in range(steps - 1):
            share = 1 - times[step + 1] / times[step]
            want = [int(torch.tensor(float(count)) * share) for count in counts]
            assert DreamQuota(eps, least=0)(quota_view(masked, step, steps)).tolist() == want
        assert DreamQuota(eps, least=0)(quota_view(masked, steps - 1, steps)).tolist() == counts

    def test_no_batch_mean(self) -> None:
        """Dream's code takes the mean over the batch: 2 and 38 masks in 4 steps then lose 4 each at first."""
        masked = first_masked([2, 38], self.WIDTH)
        mean = int(float(masked.sum()) / 2 * (1 - 0.75025 / 1.0))
        assert mean == 4
        assert dream_quota(quota_view(masked, 0, 4)).tolist() == [1, 9]


@pytest.mark.parametrize(
    ("decoder", "score"),
    [
        (TopProbability(position_temperature=0.3), lambda row: row.probability),
        (Margin(position_temperature=0.3), lambda row: row.top1 - row.top2),
        (Entropy(position_temperature=0.6), lambda row: -row.entropy),
    ],
)
def test_positions_drawn_at_a_temperature_follow_the_softmax(
    decoder: Stepwise, score: Callable[[reference.Row], float]
) -> None:
    """Two of four positions, without replacement, 20,000 times."""
    draws, quota = 20_000, 2
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 2
    rows = [reference.row_statistics(row) for row in logits.tolist()]
    view = quota_view(torch.ones(draws, 4, dtype=torch.bool), 0, 2)
    sample = torch.arange(draws)[:, None].expand(draws, 4)
    keys = torch.stack((sample, torch.arange(4).expand(draws, 4), torch.zeros_like(sample)), -1)
    view = dataclasses.replace(view, keys=keys)
    values = torch.tensor([[r.probability, r.top1, r.top2, r.entropy] for r in rows]).T[:, None].expand(4, draws, 4)
    tokens = torch.ones(draws, 4, dtype=torch.int64)
    choice = decoder.choose(view, Proposal(tokens, *values))
    picked = select(
        choice.scores, choice.candidates, tokens, torch.zeros_like(tokens), choice.rule, quota=choice.quota,
        temperature=choice.temperature, seed=view.seed, keys=keys,
    )  # fmt: skip
    temperature = decoder.position_temperature
    law = reference.positions_law({i: score(row) for i, row in enumerate(rows)}, quota, temperature)
    sets = [frozenset(pair) for pair in itertools.combinations(range(4), 2)]
    counts = [int((picked[:, sorted(s)].all(-1)).sum()) for s in sets]
    assert sum(counts) == draws
    assert stats.chisquare(counts, [law[s] * draws for s in sets]).pvalue > 1e-3


# Names and parameters


def test_every_name_gives_its_decoder_or_says_what_it_needs() -> None:
    for name, kind in DECODERS.items():
        if kind in (GenMD4, Learned, PositionAware):
            with pytest.raises(ValueError, match=f"decoder '{name}' has no default .*{kind.__name__}"):
                by_name(name)
        else:
            assert type(by_name(name)) is kind
    with pytest.raises(ValueError, match="decoder 'beam' is not known: there is ancestral, "):
        by_name("beam")


def test_every_decoder_is_exported_and_named() -> None:
    kinds = {
        kind for kind in vars(decoders).values()
        if isinstance(kind, type) and issubclass(kind, Planned | Stepwise) and kind not in (Planned, Stepwise)
    }  # fmt: skip
    assert kinds == set(DECODERS.values())
    assert {kind.__name__ for kind in kinds} <= set(decoders.__all__)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ancestral(1.0), r"eps must lie in \[0, 1\), not 1\.0"),
        (lambda: Ancestral(math.nan), r"eps must lie in \[0, 1\), not nan"),
        (lambda: Ancestral(alpha="square"), "alpha must be one of linear, cosine, not 'square'"),
        (lambda: Ancestral(alpha=lambda t: t), "alpha must rise as t falls"),
        (lambda: Ancestral(alpha=lambda t: 2 - 2 * t), "alpha must rise as t falls"),
        (lambda: Ancestral(alpha=lambda t: t[:3]), "alpha must give a floating tensor of its argument's shape"),
        (lambda: TopProbability(-1.0), r"position_temperature must lie in \[0, inf\), not -1\.0"),
        (lambda: Margin(math.inf), "position_temperature must lie in"),
        (lambda: Entropy(quota="half"), "quota must be one of even, dream, not 'half'"),
        (lambda: Threshold(1.5), r"threshold must lie in \[0, 1\], not 1\.5"),
        (lambda: Threshold("high"), "threshold must lie in"),
        (lambda: SoftParallel(soft=1), "soft must be True or False, not 1"),
        (lambda: SoftParallel(confident=2.0), r"confident must lie in \[0, 1\], not 2\.0"),
        (lambda: Factor(-1.0), "factor must lie in"),
        (lambda: EntropyBound(math.nan), "gamma must lie in"),
        (lambda: PositionAware(FREQUENCY, lam=-1.0), "lam must lie in"),
        (lambda: PositionAware(FREQUENCY, alpha=0.0), r"alpha must lie in \(0, inf\], not 0\.0"),
        (lambda: PositionAware(FREQUENCY[None]), r"frequency must be floating \[V\]"),
        (lambda: PositionAware(FREQUENCY * 100), "frequency must hold shares"),
        (lambda: PositionAware(FREQUENCY).fitted(9, torch.device("cpu")), "frequency must have 9 entries"),
        (lambda: reference_frequencies(torch.tensor([1, 9]), 9), r"ids must be whole numbers in 0\.\.8"),
        (lambda: Hyperschedule("cosine"), "kind must be one of flat, quenched, block, sliding"),
        (lambda: Hyperschedule("block"), "width goes with kind 'block' or 'sliding', and only with it"),
        (lambda: Hyperschedule("flat", 3), "width goes with kind"),
        (lambda: Hyperschedule("sliding", 0), "width must be a whole number of at least 1, not 0"),
        (lambda: Hyperschedule("sliding", 2.5), "width must be a whole number"),
        (lambda: GenMD4(0.0), "exponents must be a number above 0"),
        (lambda: GenMD4(torch.tensor([1.0, math.nan])), "exponents must be"),
        (lambda: ReMDM("often"), "kind must be one of cap, rescale, conf, loop"),
        (lambda: ReMDM("conf", 0.1), "eta must be None with kind 'conf'"),
        (lambda: ReMDM("cap", 1.1), r"eta must lie in \[0, 1\], not 1\.1"),
        (lambda: ReMDM("loop", t_on=0.05, t_off=0.5), r"t_off must lie in \(0, 0\.05\)"),
        (lambda: ReMDM("loop", alpha_on=1.0), "alpha_on must lie in"),
        (lambda: Edit(2.0), "mask_threshold must lie in"),
        (lambda: Edit(0.5, -0.5), "edit_threshold must lie in"),
        (lambda: Edit(closing_steps=-1), "closing_steps must be a whole number"),
    ],
)  # fmt: skip
def test_parameters_that_cannot_be_right_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_published_defaults() -> None:
    assert [ReMDM(kind).eta for kind in ("cap", "rescale", "conf", "loop")] == [0.008, 0.015, None, 0.02]
    loop = ReMDM("loop")
    assert (loop.t_on, loop.t_off, loop.alpha_on) == (0.55, 0.05, 0.9)
    assert Edit().closing_steps == 16
    assert Stepwise.closing_steps == 0


def test_reference_frequencies_are_shares() -> None:
    frequency = reference_frequencies(torch.tensor([[1, 1], [2, 5]]), 7)
    assert frequency.tolist() == [0.0, 0.5, 0.25, 0.0, 0.0, 0.25, 0.0]
    fitted = PositionAware(frequency).fitted(7, torch.device("cpu"))
    assert torch.equal(fitted.frequency, frequency)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (decoders.Ancestral(0.125), decoders.Ancestral(Fraction(1, 8))),
        (decoders.Edit(0.5, 0.25, 2), decoders.Edit(Fraction(1, 2), np.float32(0.25), np.int64(2))),
        (decoders.Hyperschedule("block", 4), decoders.Hyperschedule("block", np.int64(4))),
        (
            decoders.ReMDM("loop", 0.25, 0.5, 0.125, 0.75),
            decoders.ReMDM("loop", *map(Fraction, (0.25, 0.5, 0.125, 0.75))),
        ),
        (decoders.TopProbability(0.5), decoders.TopProbability(Fraction(1, 2))),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_numbers_of_every_kind_are_numbers(ours: Any, theirs: Any, make_dit: Callable[..., mdkern.DiT]) -> None:
    one, other = (mdkern.sample(make_dit(), length=8, seed=0, decoder=decoder).sequences for decoder in (ours, theirs))
    assert ours == theirs
    assert one.equal(other)
