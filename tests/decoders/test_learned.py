"""The learned decoder: its worked example, its rules against slow ones, its files, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import decoders
from mdkern.decoders import Learned, Policy
from mdkern.decoders.base import Proposal
from mdkern.decoders.policy import DESCRIPTION, FILTER, ORDER, WEIGHTS, features
from tests.conftest import random_dit
from tests.decoders.test_decoders import check_reveals
from tests.problems.decoder_states import VOCAB, quota_view
from tests.problems.policies import random_policy
from tests.references import decoding_rules as reference
from tests.references.slow_sampler import chosen


def slow_network(policy: Policy) -> reference.Network:
    layers = [(weight.tolist(), bias.tolist()) for weight, bias in policy.layers]
    return reference.Network(layers, policy.mean.tolist(), policy.deviation.tolist())


MASKED = torch.tensor([[True, False, True, True]])
NAN = float("nan")


def worked(values: list[float]) -> Tensor:
    """The values of columns 0, 2 and 3; what nobody asked for is NaN."""
    return torch.tensor([[values[0], NAN, *values[1:]]])


def test_features_of_the_worked_example() -> None:
    p = worked([0.9, 0.3, 0.6])
    proposal = Proposal(torch.tensor([[1, -1, 2, 3]]), p, p, worked([0.06, 0.29, 0.2]), worked([0.4, 1.3, 1.0]))
    inputs = features(MASKED, torch.arange(4)[None], proposal, 5, 4)[0]
    want = [
        [2.197225, 2.197225, 0.84, 0.248534, 0, 0.75, 0, 1, 2.197225, 0.6],
        [0.0] * 10,
        [-0.847298, -0.847298, 0.01, 0.807735, 0.5, 0.75, 0.25, 1, 2.197225, 0.6],
        [0.405465, 0.405465, 0.4, 0.621335, 0.75, 0.75, 0.5, 0, 2.197225, 0.6],
    ]
    torch.testing.assert_close(inputs, torch.tensor(want), atol=2e-6, rtol=0.0)


def test_features_of_probabilities_that_rounding_has_left_above_1() -> None:
    p = worked([1.0, 1.0 + 2**-20, 0.0])
    inputs = features(MASKED, torch.arange(4)[None], Proposal(torch.tensor([[1, -1, 2, 3]]), p, p, p, p), 5, 4)[0]
    assert inputs[:, :2].T.tolist() == [[12.0, 0.0, 12.0, -12.0]] * 2
    assert inputs.isfinite().all()


def test_the_rule_of_the_worked_example() -> None:
    """Scores 2, -1 and 0.5 from p = .9, .3 and .6 by a network that bends: the filter, and the order's budgets."""
    scores = torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    p = worked([0.9, 0.3, 0.6])
    view = quota_view(MASKED, 0, 1)
    tokens = torch.tensor([[1, -1, 2, 3]])

    class Fixed(Policy):
        def score(self, inputs: Tensor) -> Tensor:
            return scores

    def reveals(kind: str, bound: float) -> list[int]:
        policy = random_policy()
        facts = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
        decoder = Learned(Fixed(**(facts | {"kind": kind})), bound)
        choice = decoder.choose(view, Proposal(tokens, p, p, p / 2, p))
        return chosen(choice, tokens, view.seed, view.keys)

    assert reveals(FILTER, 0.6) == [0, 3]
    assert reveals(FILTER, 0.9) == [0]
    assert reveals(FILTER, 0.2) == [0, 2, 3]
    assert (reveals(FILTER, 0.268941), reveals(FILTER, 0.268942)) == ([0, 2, 3], [0, 3])  # the sigmoid of -1
    assert (reveals(FILTER, 0.622459), reveals(FILTER, 0.622460)) == ([0, 3], [0])  # of 0.5
    assert reveals(ORDER, 0.05) == [0]
    assert reveals(ORDER, 0.51) == [0, 3]
    assert reveals(ORDER, 1.3) == [0, 2, 3]


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize(("kind", "bound"), [(FILTER, 0.5), (FILTER, 0.8), (ORDER, 0.6), (ORDER, 2.5)])
def test_reveals_are_those_of_the_slow_rule(kind: str, bound: float, hidden: int | None) -> None:
    policy = random_policy(kind, hidden, block_length=16)
    rule = reference.learned_filter if kind == FILTER else reference.learned_order
    case = reference.Case("learned", {}, rule, (slow_network(policy), VOCAB - 1, 16, bound))
    check_reveals(Learned(policy, bound), case, False, trials=30)


def test_files_give_the_same_policy_back(tmp_path: Path) -> None:
    for policy in (random_policy(), random_policy(ORDER, None, bound=3.0, block_length=16, model_sha256="ab")):
        policy.save(tmp_path / "policy")
        found = Learned(str(tmp_path / "policy"))
        assert found.bound == policy.bound
        for name in ("kind", "block_length", "vocab_size", "model_sha256"):
            assert getattr(found.network, name) == getattr(policy, name)
        for ours, theirs in zip(found.network.tensors(), policy.tensors(), strict=True):
            assert torch.equal(ours, theirs)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no policy that can be read"):
        Policy.load(tmp_path / "nowhere")
    random_policy().save(tmp_path)
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    for change, message in (
        ({"format": 9}, "is of another format than 1"),
        ({"features": ["logit"]}, r"is a policy of other inputs \(\['logit'\]\): train it anew"),
        ({"mean": [0.0]}, r"mean and deviation must be \[10\]"),
        ({"deviation": [0.0] * 10}, "deviation must be above 0"),
        ({"bound": 1.0}, "bound must lie between 0 and 1"),
        ({"kind": "net"}, "kind must be one of filter, order"),
        ({"block_length": 0}, "block_length must be a whole number of at least 1"),
    ):
        (tmp_path / DESCRIPTION).write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=message):
            Policy.load(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps(described))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not the file that {DESCRIPTION} describes"):
        Policy.load(tmp_path)


class TestRuns:
    MODEL = random_dit(vocab_size=11, mask_id=10)
    POLICY = random_policy(vocab_size=11, block_length=4)

    def sample(self, decoder: Any, **options: Any) -> mdkern.SampleOutput:
        ids = torch.full((5, 16), 10)
        ids[1:, :3], ids[3:, 8] = 1, 2
        given = {"input_ids": ids, "decoder": decoder, "block_length": 4, "seed": 0, "temperature": 0.5}
        return mdkern.sample(self.MODEL, **(given | options))

    @pytest.mark.parametrize("kind", [FILTER, ORDER])
    def test_alone_or_among_others_a_sequence_is_the_same(self, kind: str) -> None:
        decoder = Learned(dataclasses.replace(self.POLICY, kind=kind), 0.6)
        together = self.sample(decoder, batch_size=2)
        assert not (together.sequences == 10).any()
        assert len(set(together.nfe["H"].tolist())) > 1
        for number in range(5):
            row = torch.full((1, 16), 10)
            row[0, :3], row[0, 8] = (1 if number else 10), (2 if number > 2 else 10)
            alone = self.sample(decoder, input_ids=row, sample_ids=[number])
            assert torch.equal(alone.sequences[0], together.sequences[number])

    def test_other_blocks_and_models_are_refused(self) -> None:
        for length in (None, 8):
            with pytest.raises(
                ValueError, match=f"block_length must be 4, not {length}: this Learned was made for such"
            ):
                self.sample(Learned(self.POLICY), block_length=length)
        with pytest.raises(ValueError, match="policy was trained for a model with 12 ids, this one has 11"):
            self.sample(Learned(random_policy(vocab_size=12)))
        with pytest.raises(ValueError, match="policy must be a Policy or the folder of one, not Tensor"):
            Learned(torch.zeros(3))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="bound must lie between 0 and 1"):
            Learned(self.POLICY, 1.5)
        Learned(random_policy(ORDER), 1.5)

    def test_blocks_that_reach_past_the_text_keep_their_length(self) -> None:
        """The features of a text that one block holds are those of the block, however short the text is."""
        policy = random_policy(vocab_size=11, block_length=40)
        seen = []

        @dataclasses.dataclass(frozen=True, eq=False)
        class Watched(Learned):
            def choose(self, view: Any, proposal: Any) -> Any:
                seen.append(features(view.masked, view.offset, proposal, 10, 40)[0, 5].tolist())
                return super().choose(view, proposal)

        self.sample(Watched(policy), block_length=40, input_ids=torch.full((1, 16), 10))
        assert seen[0][4:7] == pytest.approx([5 / 40, 16 / 40, 5 / 40])

    @pytest.mark.filterwarnings("ignore:.*runs by its logits")
    def test_noise_of_the_position_alone(self) -> None:
        """A model that ignores what is written then proposes the same token at every step."""
        logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(1)) * 0.1
        model = mdkern.adapt(lambda ids: logits.expand(len(ids), 16, 10), vocab_size=10, mask_id=10)

        def run(fresh: bool, bound: float) -> list[int]:
            decoder = Learned(random_policy(vocab_size=11), bound, fresh_noise=fresh)
            ids: list[int] = mdkern.sample(model, length=16, decoder=decoder, seed=0).sequences[0].tolist()
            return ids

        pass_by_pass, at_once = ([run(fresh, bound) for bound in (0.999, 0.001)] for fresh in (True, False))
        assert pass_by_pass[0] != pass_by_pass[1]
        assert at_once[0] == at_once[1]

    def test_it_has_a_likelihood(self) -> None:
        text = torch.arange(16)[None] % 10
        wanted = torch.ones(1, 16, dtype=torch.bool)
        found = mdkern.likelihood(
            self.MODEL,
            input_ids=text,
            wanted=wanted,
            method="decoder",
            decoder=Learned(self.POLICY),
            by="top1",
            block_length=4,
        )
        assert torch.isfinite(found.nats).all()


def test_it_is_exported() -> None:
    assert decoders.DECODERS["learned"] is Learned
