"""Training of the learned decoder: which states are collected, what is fitted, and both ways to improve on it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern.decoders import Learned, Policy
from mdkern.decoders.policy import FEATURES
from tests.conftest import random_dit
from tests.problems.policies import random_policy
from tests.references import decoding_rules as rules
from tests.references.slow_sampler import PairModel
from training.policy import __main__ as command
from training.policy.closed_loop import Strategy, improve, parameters_of, set_parameters, utilities
from training.policy.fit import cross_entropy, curves, fit_filter, report, split
from training.policy.order import draw_order, inner_sum, log_prefix, surrogate, train_order
from training.policy.states import FIELDS, OracleRun, Recorder, States, collect, run_oracle

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")


# States


def test_the_oracle_run_of_the_worked_example() -> None:
    """Reference 7 8 9; the model says 7 0 0, then 7 8 0, then 7 8 0 again."""

    def logits(ids: Tensor) -> Tensor:
        said = torch.tensor([[7, 0, 0] if row[0] == 10 else [7, 8, 0] for row in ids.tolist()])
        return torch.nn.functional.one_hot(said, 10) * 5.0

    recorder, reference = Recorder(10, 3), torch.tensor([[7, 8, 9]])
    decoder = OracleRun(recorder, reference, 0, torch.full((1, 3), -1))
    model = mdkern.adapt(logits, vocab_size=10, mask_id=10)
    run_oracle(model, torch.full((1, 3), 10), decoder, block_length=3, temperature=0.0)
    states = recorder.states(reference, 0, False)
    assert [len(x) for x in recorder.token] == [3, 2, 1]
    assert states.right.tolist() == [True, False, False, True, False, False]
    assert states.counts.all()
    assert states.inputs[:, 4].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1 / 3, 2 / 3, 2 / 3])


LENGTH, VOCAB, BLOCK = 10, 7, 4
MODEL = PairModel(LENGTH, VOCAB, sharpness=3.0)
Found = list[tuple[list[float], bool, bool]]


def slow_states(ids: list[int]) -> tuple[Found, list[int]]:
    """The states of both runs at temperature 0, in plain Python: inputs, whether it is right, whether it counts."""
    first = ids.index(VOCAB)
    blocks = [range(start, min(start + BLOCK, LENGTH)) for start in range(first, LENGTH, BLOCK)]

    def look(text: list[int], block: range) -> tuple[list[Any], dict[int, list[float]]]:
        rows = [rules.row_statistics(row) for row in MODEL.of(text, 0)]
        return rows, rules.learned_features(rows, [token == VOCAB for token in text], block, VOCAB, BLOCK)

    noted, text = [], list(ids)
    for block in blocks:
        while any(text[i] == VOCAB for i in block):
            rows, inputs = look(text, block)
            best = rules.best({i: rows[i].probability for i in inputs}, 1)[0]
            noted += [(values, i, rows[i].token, i != best) for i, values in inputs.items()]
            text[best] = rows[best].token
    found = [(values, token == text[i], counts) for values, i, token, counts in noted]
    now = list(ids)
    for block in blocks:
        before: dict[int, int] = {}
        while any(now[i] == VOCAB for i in block):
            rows, inputs = look(now, block)
            right = [i for i in inputs if rows[i].token == text[i]]
            found += [(values, i in right, True) for i, values in inputs.items()]
            over = not right or all(before.get(i) == rows[i].token for i in inputs)
            before |= {i: rows[i].token for i in inputs}
            for i in inputs if over else right:
                now[i] = text[i]
    return found, text


def test_states_are_those_of_slow_runs() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (6, LENGTH), generator=generator)
    ids = torch.where(torch.arange(LENGTH) < torch.randint(0, 4, (6, 1), generator=generator), ids, VOCAB)
    states, reference = collect(MODEL.denoiser(), ids, 5, BLOCK, 0.0, 0)
    for number, row in enumerate(ids.tolist()):
        want, text = slow_states(row)
        assert reference[number].tolist() == text
        ours = states.only(states.text == 5 + number)
        got = sorted(zip(ours.inputs.tolist(), ours.right.tolist(), ours.counts.tolist()))
        assert len(got) == len(want)
        for (inputs, *facts), (expected, *known) in zip(got, sorted(want)):
            assert inputs == pytest.approx(expected, abs=2e-4)
            assert facts == known


def test_references_at_a_temperature_are_functions_of_the_noise() -> None:
    """Alone or with others, and however many passes write it: an oracle that reveals more at once is right as often."""
    ids = torch.full((4, LENGTH), VOCAB)
    states, reference = collect(MODEL.denoiser(), ids, 0, BLOCK, 0.8, 3)
    alone, text = collect(MODEL.denoiser(), ids[:1], 2, BLOCK, 0.8, 3)
    assert torch.equal(text[0], reference[2])
    assert len(set(map(tuple, reference.tolist()))) > 1
    same = states.only(states.text == 2)
    assert all(torch.equal(getattr(alone, name), getattr(same, name)) for name in FIELDS)
    last = states.inputs[:, 5] == 1 / BLOCK  # of a block's last mask, as the reference's run saw it
    reference_run = last & ~states.counts
    assert states.right[reference_run].all()


# Filters


def test_the_loss_of_the_worked_example() -> None:
    assert cross_entropy(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, True])) == pytest.approx(
        0.304756, abs=1e-6
    )


def test_precision_and_recall() -> None:
    found = curves(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.tensor([True, True, False, True, False]))
    assert found["precision"] == {"0.1": 1.0, "0.2": 1.0, "0.3": 1.0}
    assert found["recall"] == pytest.approx({"0.95": 2 / 3, "0.9": 2 / 3, "0.8": 2 / 3})
    assert curves(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))["recall"]["0.8"] == 0.0


def made_up(count: int) -> States:
    """Positions that are right with a chance that a linear function of two inputs gives."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, len(FEATURES), generator=generator) * 2 + 1
    chance = (1.5 * (inputs[:, 1] - 1) - (inputs[:, 6] - 1)).sigmoid()
    right = torch.rand(count, generator=generator) < chance
    text = torch.arange(count) * 10 // count
    return States(inputs, right, text, torch.arange(count) % 7 > 0)


@pytest.mark.parametrize("hidden", [None, 8])
def test_filters_find_what_there_is_to_find(hidden: int | None) -> None:
    fitting, testing = split(made_up(20_000), 0.2, 10)
    assert set(testing.text.tolist()) == {8, 9}
    assert set(fitting.text.tolist()) == set(range(8))
    policy = fit_filter(fitting, hidden, 0, steps=400, batch=512, lr=0.02, bound=0.7, block_length=4, vocab_size=9)
    exact = (1.5 * (testing.inputs[:, 1] - 1) - (testing.inputs[:, 6] - 1)).double()
    assert cross_entropy(policy.score(testing.inputs), testing.right) < cross_entropy(exact, testing.right) + 0.01
    found = report(testing, {"ours": policy})
    assert found["ours"]["bce"] < found["p"]["bce"]
    again = fit_filter(fitting, hidden, 0, steps=400, batch=512, lr=0.02, bound=0.7, block_length=4, vocab_size=9)
    assert torch.equal(parameters_of(policy), parameters_of(again))


# The closed loop


def test_ranks_count_and_not_sizes() -> None:
    assert utilities(torch.tensor([3.0, 1.0, 100.0])).tolist() == [0.0, -0.5, 0.5]
    assert utilities(torch.tensor([2.0, 2.0, 9.0])).tolist() == [-0.25, -0.25, 0.5]


class StoppedError(Exception):
    pass


def test_the_strategy_climbs_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    goal = torch.linspace(-1, 1, 11)

    def value_of(policy: Policy) -> float:
        return -float((parameters_of(policy) - goal).square().sum())

    strategy = Strategy(rounds=25, pairs=8, deviation=0.1, rate=0.3)
    whole, parts = random_policy(hidden=None), random_policy(hidden=None)
    history = improve(whole, value_of, tmp_path / "whole.json", 1, strategy)
    assert len(history) == 26
    best = max(entry["value"] for entry in history)
    assert best > history[0]["value"] / 4
    assert value_of(whole) == pytest.approx(best, rel=1e-5)
    calls = itertools.count()

    def interrupted(policy: Policy) -> float:
        if next(calls) == 200:
            raise StoppedError
        return value_of(policy)

    with pytest.raises(StoppedError):
        improve(parts, interrupted, tmp_path / "parts.json", 1, strategy)
    assert improve(parts, value_of, tmp_path / "parts.json", 1, strategy) == history
    with pytest.raises(ValueError, match=r"parts\.json is of another run"):
        improve(parts, value_of, tmp_path / "parts.json", 2, strategy)


def test_parameters_are_changed_in_place() -> None:
    policy = random_policy()
    tensors = policy.tensors()
    vector = torch.arange(len(parameters_of(policy)), dtype=torch.float32)
    set_parameters(policy, vector)
    assert torch.equal(parameters_of(policy), vector)
    assert all(ours is theirs for ours, theirs in zip(policy.tensors(), tensors, strict=True))


# Orders

# p(x0 = 1) = .6, p(x1 = 0) = .7, p(x1 = 0 | x0) = .8, p(x0 = 1 | x1) = .9, for the text (1, 0)
LOG_P = {(): [0.6, 0.7], (0,): [None, 0.8], (1,): [0.9, None]}


def log_p_after(revealed: Sequence[int]) -> Tensor:
    return torch.tensor([[math.log(p) if p else 0.0 for p in LOG_P[tuple(revealed)]]], dtype=torch.float64)


def terms(order_scores: Tensor) -> dict[tuple[int, ...], Tensor]:
    """F of every set of revealed positions, with a policy that has no preference."""
    none = torch.zeros(1, 2, dtype=torch.float64)
    return {
        revealed: inner_sum(
            order_scores, none, log_p_after(revealed), torch.tensor([[i not in revealed for i in range(2)]])
        )[0]
        for revealed in LOG_P
    }


def test_the_bound_of_the_worked_example() -> None:
    def bound(first: float) -> float:
        scores = torch.tensor([[math.log(first), math.log(1 - first)]], dtype=torch.float64)
        f = terms(scores)
        return float(f[()] + first * f[(0,)] + (1 - first) * f[(1,)])

    f = terms(torch.tensor([[math.log(0.25), math.log(0.75)]], dtype=torch.float64))
    assert float(f[()]) == pytest.approx(-0.526025, abs=1e-6)
    assert float(f[(0,)]) == pytest.approx(math.log(0.8))
    assert float(f[(1,)]) == pytest.approx(math.log(0.9))
    assert bound(0.25) == pytest.approx(-0.660831, abs=1e-6)
    assert bound(0.432432) == pytest.approx(-0.588787, abs=1e-6)
    assert bound(0.432432) == pytest.approx(math.log(0.555), abs=1e-6)
    assert max(bound(0.42), bound(0.45)) < bound(0.432432)


def test_the_gradient_is_that_of_the_bound() -> None:
    """The mean of the estimate over all orders and counts, by enumeration, against the bound's own gradient."""
    generator = torch.Generator().manual_seed(0)
    log_p = {
        revealed: torch.randn(3, generator=generator, dtype=torch.float64) - 1
        for size in range(3) for revealed in itertools.combinations(range(3), size)
    }  # fmt: skip
    order_scores = torch.randn(1, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    policy_scores = torch.randn(1, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    able = torch.ones(1, 3, dtype=torch.bool)
    orders = list(itertools.permutations(range(3)))

    def inner(order: tuple[int, ...], count: int) -> Tensor:
        revealed = tuple(sorted(order[:count]))
        left = torch.tensor([[i not in revealed for i in range(3)]])
        scores = policy_scores * (1 + count)  # so that the policy's scores depend on the state
        return inner_sum(order_scores, scores, log_p[revealed][None], left)

    def place(order: tuple[int, ...]) -> Tensor:
        return torch.tensor([[order.index(i) for i in range(3)]])

    def chance(order: tuple[int, ...], count: int) -> Tensor:
        return log_prefix(order_scores, place(order), torch.tensor([count]), able).exp()

    bound = sum(chance(order, 3) * sum(inner(order, count) for count in range(3)) for order in orders)
    want = torch.autograd.grad(bound.sum(), (order_scores, policy_scores))
    estimate = torch.zeros(1, dtype=torch.float64)
    for one, other in itertools.product(orders, orders):
        weight = (chance(one, 3) * chance(other, 3)).detach()
        for count in range(3):
            sums = inner(one, count), inner(other, count)
            places = place(one), place(other)
            estimate = estimate + weight / 3 * surrogate(order_scores, sums, places, torch.tensor([count]), able)
    got = torch.autograd.grad(estimate.sum(), (order_scores, policy_scores))
    assert float(sum(chance(order, 3) for order in orders).detach()) == pytest.approx(1.0)
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs)
        assert float(theirs.abs().max()) > 1e-3


def test_orders_are_drawn_as_they_are_weighed() -> None:
    scores = torch.tensor([0.7, -0.4, 0.1, 9.0])
    able = torch.tensor([True, True, True, False])
    count = 20_000
    place = draw_order(scores.expand(count, 4), able.expand(count, 4), torch.Generator().manual_seed(0))
    assert bool((place[:, 3] == 3).all())
    for order in itertools.permutations(range(3)):
        wanted = torch.tensor([[*(order.index(i) for i in range(3)), 3]])
        share = float((place == wanted).all(-1).double().mean())
        chance = float(log_prefix(scores[None], wanted, torch.tensor([3]), able[None]).exp())
        assert share == pytest.approx(chance, abs=4 * math.sqrt(chance / count))


def test_an_order_is_trained_and_decodes() -> None:
    """The texts are the model's own, written where it is surest first: in that order they are likelier."""
    dit = random_dit()
    with torch.no_grad():
        dit.head_weight *= 2.0
    model = mdkern.adapt(dit)
    texts = mdkern.sample(
        model, num_samples=64, length=16, decoder="top_probability", block_length=4, temperature=0.5, seed=0
    ).sequences
    policy, bounds = train_order(model, texts, 4, seed=0, steps=100, batch=64, lr=0.03, bound=1.0, vocab_size=11)
    assert len(bounds) == 100
    assert sum(bounds[-20:]) > sum(bounds[:20]) + 0.7
    out = mdkern.sample(model, length=16, decoder=Learned(policy), block_length=4, seed=0)
    assert not (out.sequences == 10).any()


# The command


TEXT = "\n".join(f"{number} and {number + 1} make {2 * number + 1}, they said." for number in range(200))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    pair = ROOT / "mdkern" / "pretrained"
    arguments = [
        "--model", str(pair / "light"), "--tokenizer", str(pair / "tokenizer"), "--text", str(tmp_path / "text.txt"),
        "--out", str(tmp_path / "run"), "--texts", "6", "--length", "24", "--written", "8", "--block-length", "4",
        "--chunk", "3", "--steps", "20", "--device", "cpu", "--test-share", "0.34",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    for name in ("p", "linear", "mlp"):
        assert f"| {name} | {found[name]['bce']:.3f} |" in table
    policy = Learned(tmp_path / "run" / "mlp")
    assert (policy.only_block_length, policy.bound, policy.network.vocab_size) == (4, 0.9, 4096)
    weights = (tmp_path / "run" / "mlp" / "weights.safetensors").read_bytes()
    states = tmp_path / "run" / "states-000003.safetensors"
    before, kept = states.read_bytes(), (tmp_path / "run" / "states-000000.safetensors").stat().st_mtime_ns
    states.unlink()  # as if it had been stopped before
    assert command.main(arguments) == 0
    assert states.read_bytes() == before
    assert (tmp_path / "run" / "states-000000.safetensors").stat().st_mtime_ns == kept
    assert (tmp_path / "run" / "mlp" / "weights.safetensors").read_bytes() == weights
    for change, message in (
        (["--seed", "1"], r"is another run \(seed differ\)"),
        (["--written", "24"], "--written 24 must be less than --length 24"),
        (["--texts", "100000"], "fewer than 100000 texts of 24"),
        (["--closed-loop", "1"], "--closed-loop and --judge go together"),
        (["--rounds", "3"], "--rounds has no effect without --closed-loop"),
        (["--order-steps", "3"], "--order-steps has no effect without --order"),
        (["--test-share", "0"], "--test-share must leave texts on both sides"),
    ):
        out = ["--out", str(tmp_path / "other")] if change[0] == "--texts" else []
        with pytest.raises(SystemExit):
            command.main([*arguments, *change, *out])
        error = capsys.readouterr().err
        assert re.search(message, error), error


@pytest.mark.slow
def test_the_command_improves_in_use_and_trains_an_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    pair, run = ROOT / "mdkern" / "pretrained", tmp_path / "run"
    assert command.main([
        "--model", str(pair / "light"), "--tokenizer", str(pair / "tokenizer"), "--text", str(tmp_path / "text.txt"),
        "--out", str(run), "--texts", "4", "--length", "12", "--written", "2", "--block-length", "2", "--steps", "20",
        "--device", "cpu", "--test-share", "0.5", "--closed-loop", "0.5", "--judge", str(ROOT / "benchmarks" / "judge"),
        "--rounds", "1", "--loop-texts", "2", "--order", "--order-steps", "5",
    ]) == 0  # fmt: skip
    said = capsys.readouterr().out
    history = json.loads((run / "closed-loop-0.5.json").read_text())["history"]
    values = [entry["value"] for entry in history]
    assert f"value {values[0]:.4f} at first, {max(values):.4f} at best" in said
    best = history[values.index(max(values))]["parameters"]
    assert parameters_of(Learned(run / "closed-loop-0.5").network).tolist() == pytest.approx(best)
    assert len(best) == len(FEATURES) + 1
    bound = float(re.search(r"the bound is (-\d+\.\d+) nats a token", said)[1])  # type: ignore[index]
    assert bound < -1.0  # of a model of 4,096 tokens
    model = mdkern.from_pretrained(pair / "light")
    for name, kind in (("closed-loop-0.5", "filter"), ("order", "order")):
        decoder = Learned(run / name)
        assert decoder.network.kind == kind
        out = mdkern.sample(model, length=4, decoder=decoder, block_length=2, seed=0)
        assert not (out.sequences == model.mask_id).any()
