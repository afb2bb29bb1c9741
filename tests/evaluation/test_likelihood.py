"""`mdkern.likelihood`: worked examples, exhaustive expectations, and independence of the batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mdkern import Denoiser, DiT, Schedule, adapt, likelihood
from mdkern.evaluation.likelihood import FEW, Texts, first_of_equal, mask_sizes, model_by_share
from mdkern.evaluation.scores import target_log_prob
from mdkern.models.denoiser import Head
from tests.evaluation import two_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")


def texts_of(count: int, length: int, seed: int = 0) -> Texts:
    ids = torch.zeros(count, length, dtype=torch.int64)
    position = torch.arange(length).expand(count, -1)
    return Texts(ids, None, ids == 0, position, torch.arange(count), torch.tensor(seed))


class TestMaskSizes:
    def test_an_even_grid_rounded_to_even_and_wrapped(self) -> None:
        """LLaDA's: n = 5, four masks, k = 2: 2, 3.25, 4.5, 5.75, so 2, 3, 4 and 6, which is 1."""
        grids = {1: [1, 2, 4, 5], 2: [2, 3, 4, 1], 3: [3, 4, 1, 2], 4: [4, 5, 1, 3], 5: [5, 1, 3, 4]}
        sizes = mask_sizes(texts_of(2000, 5), torch.full((2000,), 5), 4)
        for row in sizes.tolist():
            assert row == grids[row[0]]
        share = torch.bincount(sizes[:, 0], minlength=6)[1:] / 2000
        assert float((share - 0.2).abs().max()) < 4 * math.sqrt(0.2 * 0.8 / 2000)

    def test_as_many_masks_as_tokens_have_every_size_once(self) -> None:
        sizes = mask_sizes(texts_of(50, 7), torch.full((50,), 7), 7)
        assert sizes.sort(-1).values.equal(torch.arange(1, 8).expand(50, -1))


class TestTwoTokens:
    def test_the_estimate_is_the_bound_in_expectation(self) -> None:
        """Two masks of two tokens are one of each size, so only the place of the smaller one is random."""
        model = two_tokens.denoiser()
        for text, bound, both in zip(two_tokens.TEXTS, two_tokens.BOUND, two_tokens.BOTH_AT_ONCE):
            found = likelihood(model, input_ids=text.expand(600, -1), samples=2).nats
            first, second = text.tolist()
            chances = (two_tokens.GIVEN[0, second], two_tokens.GIVEN[1, first])
            alone = [-math.log(p if one else 1 - p) for p, one in zip(chances, (first, second))]
            values = torch.tensor([(both + 2 * nats) / 2 for nats in alone], dtype=torch.float64)
            nearest = (found[:, None] - values).abs()
            assert float(nearest.min(-1).values.max()) < 2e-6
            assert float(values.mean()) == pytest.approx(bound, abs=1e-6)
            share = (nearest[:, 0] < nearest[:, 1]).double().mean()
            assert abs(float(share) - 0.5) < 4 * 0.5 / math.sqrt(600)

    def test_one_wanted_token_is_exact_with_one_mask(self) -> None:
        wanted = torch.tensor([[False, True]]).expand(4, -1)
        found = likelihood(two_tokens.denoiser(), input_ids=two_tokens.TEXTS, wanted=wanted, samples=1)
        chances = [two_tokens.GIVEN[1, first] for first, _ in two_tokens.TEXTS.tolist()]
        right = [-math.log(p if x else 1 - p) for p, (_, x) in zip(chances, two_tokens.TEXTS.tolist())]
        assert found.nats.tolist() == pytest.approx(right, abs=1e-6)
        assert found.standard_error.tolist() == [0.0] * 4
        assert found.tokens.tolist() == [1] * 4


def all_masks_bound(model: DiT, ids: Tensor) -> float:
    """The bound of one text by every mask of every size, with the model's own logits, in float64."""
    length, total = ids.shape[0], 0.0
    for size in range(1, length + 1):
        masks = list(itertools.combinations(range(length), size))
        for mask in masks:
            masked = ids.clone()
            masked[list(mask)] = model.config.mask_id
            logits = adapt(model).logits(masked[None]).detach()[0].double().log_softmax(-1)
            nats = -sum(float(logits[i, ids[i]]) for i in mask)
            total += nats * length / size / len(masks) / length
    return total


@pytest.fixture(scope="module")
def model(make_dit: Callable[..., DiT]) -> DiT:
    return make_dit(seed=3)


def test_masks_of_as_many_tokens_as_are_compared_are_told_apart() -> None:
    """Of 31 out of 62 tokens no two masks coincide; of all 62 they all do."""
    sizes = torch.tensor([[31] * 40 + [FEW] * 2])
    assert first_of_equal(texts_of(1, FEW), sizes).tolist() == [[*range(40), 40, 40]]
    assert first_of_equal(texts_of(1, FEW + 1), sizes + 1).tolist() == [list(range(42))]


def test_the_first_of_equal_masks_is_found_for_each_text() -> None:
    """Two tokens have three masks."""
    texts = texts_of(3, 2)
    sizes = mask_sizes(texts, torch.full((3,), 2), 512)
    first = first_of_equal(texts, sizes)
    assert all(len(row.unique()) == 3 for row in first)
    assert (first <= torch.arange(512)).all()
    assert torch.equal(first.gather(1, first), first)
    assert torch.equal(sizes.gather(1, first), sizes)


class TestDiT:
    def test_the_mean_is_that_over_all_masks(self, model: DiT) -> None:
        ids = torch.tensor([3, 1, 4, 1])
        found = likelihood(model, input_ids=ids.expand(300, -1), samples=4)
        right = all_masks_bound(model, ids)
        error = float(found.nats.std()) / math.sqrt(300)
        assert abs(float(found.nats.mean()) - right) < 4 * error
        assert 0 < error < 0.05 * right

    def test_a_text_alone_is_as_in_a_batch_padded_or_not(self, model: DiT) -> None:
        ids = torch.randint(10, (3, 9), generator=torch.Generator().manual_seed(0))
        together = likelihood(model, input_ids=ids, samples=5, batch_size=4)
        for row in range(3):
            alone = likelihood(model, input_ids=ids[row : row + 1], samples=5, sample_ids=[row])
            assert alone.nats[0] == pytest.approx(float(together.nats[row]), rel=1e-5)
        padded = torch.cat((torch.zeros(3, 2, dtype=torch.int64), ids, torch.zeros_like(ids[:, :1])), dim=1)
        mask = torch.ones_like(padded)
        mask[:, :2] = mask[:, -1:] = 0
        again = likelihood(model, input_ids=padded, attention_mask=mask, samples=5)
        assert again.nats.tolist() == pytest.approx(together.nats.tolist(), rel=1e-5)

    def test_masks_that_coincide_are_run_once(self, model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
        """Texts of 1, 2, 3 and 9 wanted tokens have 1, 3, 7 and 511 masks; all tokens of a text are one of them."""
        ids = torch.randint(10, (4, 9), generator=torch.Generator().manual_seed(0))
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        for row, columns in enumerate(([4], [0, 7], [1, 2, 8], range(9))):
            wanted[row, list(columns)] = True
        found = likelihood(model, input_ids=ids, wanted=wanted, samples=64)
        assert found.nfe["H"].tolist()[:3] == [1, 3, 7]
        assert 40 < int(found.nfe["H"][3]) < 64
        monkeypatch.setattr("mdkern.evaluation.likelihood.COMPARED_ENTRIES", 1)
        assert likelihood(model, input_ids=ids, wanted=wanted, samples=64).nfe["H"].tolist() == found.nfe["H"].tolist()
        monkeypatch.setattr("mdkern.evaluation.likelihood.FEW", 0)
        each = likelihood(model, input_ids=ids, wanted=wanted, samples=64)
        assert each.nfe["H"].tolist() == [64] * 4
        assert found.nats.tolist() == pytest.approx(each.nats.tolist(), rel=1e-6)
        assert found.standard_error.tolist() == pytest.approx(each.standard_error.tolist(), rel=1e-4, abs=1e-9)

    def test_more_masks_have_a_smaller_error_that_is_true(self, model: DiT) -> None:
        ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]).expand(64, -1)
        few, many = (likelihood(model, input_ids=ids, samples=samples) for samples in (4, 64))
        assert float(many.standard_error.mean()) < 0.4 * float(few.standard_error.mean())
        assert float(many.nats.std()) < 1.3 * float(many.standard_error.mean())  # the grid is no worse than chance

    def test_a_schedule_takes_its_model_by_the_share_that_is_masked(
        self, model: DiT, make_dit: Callable[..., DiT]
    ) -> None:
        other = make_dit(seed=4)
        ids = torch.randint(10, (2, 8), generator=torch.Generator().manual_seed(1))
        light = likelihood(model, other, "L2 H4 L2", input_ids=ids, samples=8)
        # Sizes 1..8, each once: 8 and 7 are of the first quarter of the steps, 2 and 1 of the last.
        assert {name: count.tolist() for name, count in light.nfe.items()} == {"L": [4, 4], "H": [4, 4]}
        alone = likelihood(model, input_ids=ids, samples=8)
        assert alone.nats.tolist() != pytest.approx(light.nats.tolist(), rel=1e-3)
        same = likelihood(model, model, "L2 H4 L2", input_ids=ids, samples=8)
        assert same.nats.tolist() == pytest.approx(alone.nats.tolist(), rel=1e-5)

    def test_shares_find_their_model(self) -> None:
        schedule = Schedule.from_shares([("A", Fraction(1, 4)), ("B", Fraction(1, 2)), ("A", Fraction(1, 4))])
        done = torch.tensor([0.0, 0.2499, 0.25, 0.74, 0.75, 0.99], dtype=torch.float64)
        assert model_by_share(schedule, ["A", "B"], done).tolist() == [0, 0, 1, 1, 0, 0]


class TestTargets:
    @pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 3.0)])
    def test_log_probabilities_are_those_of_all_logits(self, scale: float, cap: float) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(20, 8, generator=generator)
        bias = torch.randn(20, generator=generator)
        bias[7] = -torch.inf
        head = Head(weight, bias, scale, cap)
        rows, targets = torch.tensor([5, 0, 0, 3]), torch.tensor([1, 7, 19, 2])
        right = head.logits(hidden[rows]).double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        found = target_log_prob(head, hidden, rows, targets)
        assert found.tolist() == pytest.approx(right.tolist(), abs=1e-5)
        assert found[1] == -torch.inf


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"input_ids": torch.tensor([[1, 2]])}, "the mask id is 2"),
            ({"input_ids": torch.tensor([[1, 3]])}, "0..2"),
            ({"input_ids": torch.tensor([1, 0])}, r"\[N, L\]"),
            ({"samples": 0}, "samples"),
            ({"wanted": torch.tensor([[False, False]])}, "no token in row 0"),
            ({"wanted": torch.tensor([[1, 0]])}, "bool"),
            ({"attention_mask": torch.tensor([[1, 0]])}, "takes none"),
        ],
    )
    def test_what_cannot_be_right_is_refused(self, changes: dict[str, object], message: str) -> None:
        arguments: dict[str, object] = {"input_ids": torch.tensor([[1, 0]])} | changes
        with pytest.raises(ValueError, match=message):
            likelihood(two_tokens.denoiser(), **arguments)  # type: ignore[arg-type]

    def test_progress_is_shown_where_it_is_asked_for(self, model: DiT, capsys: pytest.CaptureFixture[str]) -> None:
        ids = torch.zeros((3, 4), dtype=torch.int64)
        for method, options, expected in (
            ("fixed_count", {"samples": 1}, "| 0/3 ["),
            ("decoder", {"decoder": "margin"}, "likelihood:"),
        ):
            likelihood(model, input_ids=ids, method=method, progress=True, **options)  # type: ignore[arg-type]
            assert expected in capsys.readouterr().err
            likelihood(model, input_ids=ids, method=method, **options)  # type: ignore[arg-type]
            assert not capsys.readouterr().err  # no terminal

    def test_nan_is_an_error(self) -> None:
        def broken(input_ids: Tensor) -> Tensor:
            return torch.full((*input_ids.shape, 2), torch.nan)

        model: Denoiser = adapt(broken, vocab_size=2, mask_id=2)
        with pytest.raises(FloatingPointError, match="NaN"):
            likelihood(model, input_ids=torch.tensor([[1, 0]]))
