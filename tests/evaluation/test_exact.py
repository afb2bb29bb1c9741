"""``likelihood(method="decoder")``: worked by hand, summed over all texts, and against frequencies of samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mdkern import DiT, adapt, likelihood, sample
from mdkern.decoders import (
    Choice,
    Edit,
    Entropy,
    EntropyBound,
    Factor,
    Margin,
    PositionAware,
    Proposal,
    Stepwise,
    Threshold,
    TopProbability,
    View,
)
from mdkern.engine import stepwise
from mdkern.engine.progress import Settings
from mdkern.engine.resolve import resolve
from mdkern.engine.state import SamplerState
from mdkern.evaluation.exact import TrueTokens
from tests.evaluation import two_tokens
from tests.references.enumeration import LENGTH, MASK, VOCAB, ToyDenoiser, chi_square_p

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")

TOYS = {name: ToyDenoiser(seed) for name, seed in (("H", 0), ("L", 1))}
TEXTS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
RARE = torch.tensor([0.02, 0.9, 0.03, 0.05, 0.0])  # frequencies; the mask has one, too


def models(options: dict[str, Any]) -> list[Any]:
    """The first toy, or both if there is a schedule."""
    return [toy.denoiser() for toy in TOYS.values()][: 2 if "schedule" in options else 1]


def exact(decoder: Any, *, texts: Tensor = TEXTS, **options: Any) -> Tensor:
    """-log p of texts."""
    return likelihood(*models(options), input_ids=texts, method="decoder", decoder=decoder, **options).nats


def sampler_law_p(decoder: Any, nats: Tensor, draws: int, **options: Any) -> float:
    """Chi-square p-value of samples against ``exp(-nats)`` of all texts."""
    shape = {"num_samples": draws, "length": LENGTH, "batch_size": draws, "seed": 0}
    out = sample(*models(options), decoder=decoder, **shape, **options)
    return chi_square_p(out.sequences, dict(zip(map(tuple, TEXTS.tolist()), (-nats).exp().tolist())))


def by_top1(kind: type[Stepwise], *parameters: Any) -> Any:
    """A decoder to sample with: it scores the most probable token, and the drawn one is revealed."""

    def choose(self: Any, view: View, proposal: Proposal) -> Choice:
        assert proposal.top1 is not None
        token = proposal.token
        if kind is PositionAware:
            token = TOYS["H"].logits(view.ids, torch.zeros(len(view.ids))).argmax(-1)
        return kind.choose(self, view, proposal._replace(token=token, probability=proposal.top1))

    return type(f"{kind.__name__}ByTop1", (kind,), {"wants_top": True, "choose": choose})(*parameters)


@dataclass(frozen=True)
class LeftToRight(Stepwise):
    """One position after the other."""

    scores_draw = False

    def choose(self, view: View, proposal: Proposal) -> Choice:
        return Choice(-view.offset.float(), view.masked, "top_k", quota=torch.ones_like(view.step))


@dataclass(frozen=True)
class ByPast(Stepwise):
    """The middle first; whether the left or the right comes next depends on how probable its token was."""

    scores_draw = False

    def choose(self, view: View, proposal: Proposal) -> Choice:
        middle_first = -(view.offset - 1.0).abs()
        left_first = torch.where(view.confidence[:, 1:2] > 0.3, -1e-2, 1e-2) * view.offset
        return Choice(middle_first + left_first, view.masked, "top_k", quota=torch.ones_like(view.step))


SETTINGS: list[dict[str, Any]] = [{}, {"steps": 2}, {"block_length": 2, "steps": 4}, {"schedule": "H1 L2"}]
BY_TOP1: list[tuple[type[Stepwise], tuple[Any, ...]]] = [
    (TopProbability, ()),
    (Threshold, (0.6,)),
    (Factor, (0.9,)),
    (PositionAware, (RARE,)),
]
# Decoder of the likelihood, its `by`, decoder to sample with.
DECODERS: list[tuple[Any, str | None, Any]] = [
    *((kind(*parameters), "top1", by_top1(kind, *parameters)) for kind, parameters in BY_TOP1),
    *((decoder, None, decoder) for decoder in (Margin(), Entropy(), EntropyBound(0.4), LeftToRight(), ByPast())),
]
CASES = [
    pytest.param(*decoder, options, id=f"{type(decoder[0]).__name__}{options or ''}")
    for decoder in DECODERS
    for options in SETTINGS
    # The one's sampler asks the first toy of whole texts, the other is of three positions, one at a time.
    if not (isinstance(decoder[0], PositionAware | ByPast) and options.get("steps", 2) == 4)
    and not (isinstance(decoder[0], PositionAware) and "schedule" in options)
]
QUICK, LONG = CASES[::3], CASES[1::3]  # together all decoders, some settings of each


@pytest.mark.parametrize(("decoder", "by", "drawn", "options"), CASES)
def test_the_likelihoods_of_all_texts_sum_to_1(
    decoder: Any, by: str | None, drawn: Any, options: dict[str, Any]
) -> None:
    assert float((-exact(decoder, by=by, **options)).exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("decoder", "by", "drawn", "options"), QUICK)
def test_the_likelihoods_are_the_frequencies_of_samples(
    decoder: Any, by: str | None, drawn: Any, options: dict[str, Any]
) -> None:
    assert sampler_law_p(drawn, exact(decoder, by=by, **options), 20_000, **options) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "by", "drawn", "options"), LONG)
def test_the_likelihoods_are_the_frequencies_of_many_samples(
    decoder: Any, by: str | None, drawn: Any, options: dict[str, Any]
) -> None:
    assert sampler_law_p(drawn, exact(decoder, by=by, **options), 100_000, **options) > 1e-3


def test_another_order_has_another_law() -> None:
    nats = exact(LeftToRight())
    for _, _, drawn in DECODERS:
        if not isinstance(drawn, LeftToRight):
            assert sampler_law_p(drawn, nats, 5000) < 1e-9
    # With the drawn token as the score, top probability is no sampler of fixed order.
    assert sampler_law_p(TopProbability(), exact(TopProbability(), by="top1"), 20_000) < 1e-9


def test_two_tokens_are_as_worked_by_hand() -> None:
    """Top probability begins with position 1, whose .7 is above .6."""
    found = likelihood(
        two_tokens.denoiser(), input_ids=two_tokens.TEXTS, method="decoder", decoder="top_probability", by="top1"
    )
    assert found.nats.tolist() == pytest.approx(two_tokens.ORDER_10, abs=2e-6)
    assert found.standard_error.tolist() == [0.0] * 4
    assert found.tokens.tolist() == [2] * 4
    assert found.nfe["H"].tolist() == [2] * 4
    at_once = likelihood(two_tokens.denoiser(), input_ids=two_tokens.TEXTS, method="decoder", decoder="margin", steps=1)
    assert at_once.nats.tolist() == pytest.approx(two_tokens.BOTH_AT_ONCE, abs=2e-6)
    assert at_once.nfe["H"].tolist() == [1] * 4


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_what_is_not_wanted_is_given(options: dict[str, Any]) -> None:
    """Of each middle token, the texts around it sum to 1; more of the text wanted, less of it likely."""
    wanted = torch.tensor([[True, False, True]]).expand(len(TEXTS), -1)
    if "block_length" in options:
        options = options | {"block_length": 1, "steps": 3}
    nats = exact(Margin(), wanted=wanted, **options)
    sums = torch.zeros(VOCAB, dtype=torch.float64).index_add(0, TEXTS[:, 1], (-nats).exp())
    assert sums.tolist() == pytest.approx([1.0] * VOCAB, abs=1e-5)


class TestDiT:
    @pytest.mark.parametrize("timed", [False, True])
    def test_left_to_right_is_a_product_of_conditionals(self, make_dit: Callable[..., DiT], timed: bool) -> None:
        """Blocks of one position, after a given one: a pass for each, of the text so far, at its own time."""
        model = make_dit(seed=3, time_conditioning=timed)
        ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
        wanted = torch.arange(6)[None] > 0
        found = likelihood(
            model, input_ids=ids, wanted=wanted, method="decoder", decoder="margin", block_length=1, steps=5
        )
        nats = 0.0
        for position in range(1, 6):
            state = torch.where(torch.arange(6)[None] < position, ids, model.config.mask_id)
            t = torch.tensor([1.0 - (position - 1) / 5]) if timed else None
            hidden = adapt(model).hidden(state, t)
            log_prob = adapt(model).head.logits(hidden[0, position][None]).detach().double().log_softmax(-1)
            nats -= float(log_prob[0, ids[0, position]])
        assert found.nats.tolist() == pytest.approx([nats], rel=1e-5)
        assert found.nfe["H"].tolist() == [5]

    @pytest.mark.parametrize("decoder", [Margin(), EntropyBound(3.0)], ids=str)
    def test_a_text_alone_is_as_in_a_batch_padded_or_not(self, make_dit: Callable[..., DiT], decoder: Any) -> None:
        model, other = make_dit(seed=3), make_dit(seed=4)
        ids = torch.randint(10, (5, 9), generator=torch.Generator().manual_seed(0))
        wanted = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.7

        def measure(texts: Tensor, wanted: Tensor, **options: Any) -> Any:
            asked = {"method": "decoder", "decoder": decoder, "steps": 4} | options
            return likelihood(model, other, "H2 L2", input_ids=texts, wanted=wanted, **asked)

        together = measure(ids, wanted, batch_size=2)
        for row in range(5):
            alone = measure(ids[row : row + 1], wanted[row : row + 1])
            assert alone.nats.tolist() == pytest.approx([float(together.nats[row])], rel=1e-5)
            assert {name: count[0] for name, count in alone.nfe.items()} == {
                name: count[row] for name, count in together.nfe.items()
            }
        padding = torch.zeros(5, 2, dtype=torch.int64)
        mask = torch.cat((padding, torch.ones_like(ids)), dim=1)
        wanted = torch.cat((padding.bool(), wanted), dim=1)
        padded = measure(torch.cat((padding - 1, ids), dim=1), wanted, attention_mask=mask)
        assert padded.nats.tolist() == pytest.approx(together.nats.tolist(), rel=1e-5)

    @pytest.mark.gpu
    def test_a_gpu_gives_what_a_cpu_gives(self, make_dit: Callable[..., DiT]) -> None:
        model = make_dit(seed=3)
        ids = torch.randint(10, (40, 12), generator=torch.Generator().manual_seed(0))
        asked: dict[str, Any] = {"method": "decoder", "decoder": Margin(), "steps": 6}
        on_cpu = likelihood(model, input_ids=ids, **asked)
        on_gpu = likelihood(model.to("cuda"), input_ids=ids.cuda(), **asked)
        close = (on_gpu.nats.cpu() / on_cpu.nats - 1).abs() < 1e-4
        assert close.double().mean() > 0.9  # an order may differ at a near tie

    @pytest.mark.gpu
    def test_no_host_synchronisation_in_a_pass(self, make_dit: Callable[..., DiT]) -> None:
        model = make_dit(seed=3).to("cuda")
        ids = torch.full((4, 12), model.config.mask_id, device="cuda")
        request = resolve(model, input_ids=ids, decoder="margin", temperature=0.0)
        state, settings = SamplerState.of(request), Settings.of(request)
        progress = stepwise.prepare(request, settings, state, None)
        denoiser, true = request.denoisers["H"], TrueTokens.of(torch.zeros_like(ids))
        with torch.no_grad():
            for turn in range(4):
                if turn == 1:  # kernels are compiled
                    progress.begin_segment(state, settings, request.steps)
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    stepwise.decode_tick(denoiser, denoiser.head, settings, state, progress, 0, propose=true.propose)
                finally:
                    if turn == 3:
                        torch.cuda.set_sync_debug_mode("default")
        assert (state.input_ids[:4] == 0).sum().item() == 4 * 3
        assert (true.log_prob[:4] < 0).all()


class Nothing(LeftToRight):
    def choose(self, view: View, proposal: Proposal) -> Choice:
        return Choice(-view.offset.float(), torch.zeros_like(view.masked), "threshold", bound=1.0)


class Draws(LeftToRight):
    def choose(self, view: View, proposal: Proposal) -> Choice:
        quota = torch.ones_like(view.step)
        return Choice(-view.offset.float(), view.masked, "top_k", quota=quota, temperature=0.5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "exact"}, "'fixed_count', 'decoder'"),
            ({"decoder": None}, "needs a decoder"),
            ({"decoder": "ancestral"}, "order before the first pass"),
            ({"decoder": "random"}, "order before the first pass"),
            ({"decoder": Edit()}, "changes what it has revealed"),
            ({"decoder": "remdm"}, "changes what it has revealed"),
            ({"decoder": Margin(position_temperature=0.1)}, "position_temperature must be 0"),
            ({"decoder": Draws()}, "draws positions at random"),
            ({"decoder": Threshold(0.9)}, "by='top1'"),
            ({"decoder": "top_probability"}, "by='top1'"),
            ({"decoder": PositionAware(RARE)}, "by='top1'"),
            ({"by": "top1"}, "changes nothing"),
            ({"by": "drawn"}, "by must be"),
            ({"samples": 8}, "samples is for method='fixed_count'"),
            ({"seed": 3}, "seed is for method='fixed_count'"),
            ({"sample_ids": [0]}, "sample_ids is for method='fixed_count'"),
            ({"steps": 0}, "steps"),
            ({"steps": 4, "block_length": 2, "steps_per_block": 2}, "must not both"),
            ({"method": "fixed_count"}, "decoder is for method='decoder'"),
            ({"method": "fixed_count", "decoder": None, "steps": 4}, "steps is for method='decoder'"),
            ({"input_ids": torch.tensor([[1, MASK, 2]])}, "never produces"),
            (
                {"input_ids": torch.tensor([[1, MASK, 2]]), "wanted": torch.tensor([[True, False, True]])},
                r"\[0, 1\] is the mask and not wanted",
            ),
        ],
    )
    def test_what_cannot_be_right_is_refused(self, changes: dict[str, Any], message: str) -> None:
        asked = {"input_ids": TEXTS[:1], "method": "decoder", "decoder": Margin()} | changes
        with pytest.raises(ValueError, match=message):
            likelihood(TOYS["H"].denoiser(), **asked)

    def test_no_decoder_is_none(self) -> None:
        with pytest.raises(TypeError, match="not int"):
            exact(3)

    def test_masks_that_stay_are_an_error(self) -> None:
        with pytest.raises(RuntimeError, match=r"Nothing .*left"):
            exact(Nothing())

    def test_nan_is_an_error(self) -> None:
        def broken(input_ids: Tensor) -> Tensor:
            return torch.full((*input_ids.shape, 2), torch.nan)

        with pytest.raises(FloatingPointError, match="NaN"):
            likelihood(
                adapt(broken, vocab_size=2, mask_id=2),
                input_ids=torch.tensor([[1, 0]]),
                method="decoder",
                decoder="margin",
            )
