"""Routers: the model of each sequence's next pass, chosen from what the last pass showed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import EntropyRouter, Router
from mdkern.decoders import Proposal, Threshold, View
from tests.conftest import random_dit

SHAPE = {"vocab_size": 70, "mask_id": 69, "max_length": 40, "width": 32, "num_heads": 2}
HEAVY, LIGHT = random_dit(0, num_blocks=3, **SHAPE), random_dit(1, num_blocks=1, **SHAPE)
ONE_BY_ONE = Threshold(1.0)


@dataclass(frozen=True)
class BySteps(Router):
    """The sandwich L10 H20 L10, as a router."""

    models: ClassVar[tuple[str, ...]] = ("L", "H")

    def route(self, view: View, proposal: Proposal, model: int) -> Tensor:
        following = view.step + 1
        return ((following >= 10) & (following < 30)).long()


def starts(count: int) -> Tensor:
    ids = torch.full((count, 40), 69)
    for row in range(count):
        ids[row, : row % 5] = 7 + row
    return ids


def draw(schedule: Any, count: int = 11, **options: Any) -> mdkern.SampleOutput:
    defaults: dict[str, Any] = {"seed": 3, "batch_size": 4, "decoder": "top_probability", "steps": 40}
    if "input_ids" not in options:
        defaults["input_ids"] = starts(count)
    return mdkern.sample(HEAVY, LIGHT, schedule, return_history=True, **(defaults | options))


@pytest.mark.parametrize("decoder", ["top_probability", ONE_BY_ONE])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_router_that_follows_a_schedule_draws_its_samples(decoder: Any, batch_size: int) -> None:
    ids = torch.full((11, 40), 69)
    routed = draw(BySteps(), input_ids=ids, decoder=decoder, batch_size=batch_size)
    fixed = draw("L10 H20 L10", input_ids=ids, decoder=decoder)
    assert torch.equal(routed.sequences, fixed.sequences)
    assert all(torch.equal(routed.nfe[name], fixed.nfe[name]) for name in "HL")
    assert routed.flops_saved == pytest.approx(fixed.flops_saved)


def test_entropies_choose_the_model() -> None:
    """Each pass's model, from entropies computed again on the drafts, one sequence at a time."""
    router = EntropyRouter(lower=3.0, upper=3.6, margin=0.02)
    out = draw(router, decoder=ONE_BY_ONE)
    models, seen = {"H": HEAVY, "L": LIGHT}, set()
    for row in range(11):
        name = "H"
        for step in range(40):
            now = out.history.step[row] == step
            if not bool(now.any()):
                continue
            assert out.history.models[int(out.history.model[row, now])] == name
            draft = out.history.draft(out.sequences, step, 69)[row, None]
            masked = draft[0] == 69
            log_p = models[name].logits(models[name].plain_hidden(draft))[0, masked].detach().log_softmax(-1)
            entropy = float(-(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1).mean())
            wider = 0.02 if name == "H" else -0.02
            assert min(abs(entropy - 3.0 + wider), abs(entropy - 3.6 - wider)) > 1e-6, "too close to tell"
            name = "H" if 3.0 - wider <= entropy <= 3.6 + wider else "L"
            seen.add(name)
    assert seen == {"H", "L"}


@pytest.mark.parametrize("decoder", ["top_probability", "threshold"])
def test_samples_do_not_depend_on_the_batch(decoder: str) -> None:
    router = EntropyRouter(lower=3.0, upper=3.5)
    together = draw(router, decoder=decoder)
    assert 0 < int(together.nfe["H"].sum()) < int(sum(together.nfe.values()).sum())
    for row in (0, 4, 10):
        alone = draw(router, decoder=decoder, input_ids=starts(11)[row, None], sample_ids=[row])
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert all(int(alone.nfe[name][0]) == int(together.nfe[name][row]) for name in "HL")


def test_batches_stay_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batch's slots, few are empty, although every sequence changes its model at a step of its own."""
    router = EntropyRouter(lower=3.0, upper=3.5)
    passes = 0
    forward = type(HEAVY).hidden

    def counted(self: Any, input_ids: Tensor, *rest: Any, **options: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return forward(self, input_ids, *rest, **options)

    monkeypatch.setattr(type(HEAVY), "hidden", counted)
    out = draw(router, count=32)
    needed = int(sum(out.nfe.values()).sum())
    assert needed / (4 * passes) > 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "ancestral"}, "needs a decoder that looks at the model"),
        ({"decoder": "threshold", "block_length": 10, "cache": "dual"}, "needs cache='none'"),
    ],
)
def test_what_has_no_place_for_a_router_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(EntropyRouter(), **options)


def test_bounds_and_models_are_checked() -> None:
    for bad in ({"lower": 2.0, "upper": 1.0}, {"margin": -1.0}, {"lower": math.nan}, {"upper": "much"}):
        with pytest.raises(ValueError, match="0 <= lower <= upper"):
            EntropyRouter(**bad)
    with pytest.raises(ValueError, match="chooses between H, L: give these models"):
        mdkern.sample(HEAVY, EntropyRouter(), length=8, decoder="threshold")


def returning(route: Any) -> Router:
    """A router of the user's that returns this, whatever it is given, in which it writes."""

    @dataclass(frozen=True)
    class Own(Router):
        def route(self, view: View, proposal: Proposal, model: int) -> Any:
            view.masked.zero_(), proposal.token.zero_()
            return route(view) if callable(route) else route

    return Own()


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (1, r"what route returns must be torch\.int64 \[4\], not int"),
        (lambda view: torch.zeros(4), r"must be torch\.int64 \[4\], not torch\.float32 \[4\]"),
        (lambda view: torch.zeros(1, dtype=torch.int64), r"must be torch\.int64 \[4\], not torch\.int64 \[1\]"),
        (
            lambda view: torch.full((4,), 7),
            r"Own: route must return numbers of the models H, L, 0 to 1, .* from 7 to 7",
        ),
        (lambda view: torch.full((4,), -1), r"0 to 1, but there are some from -1 to -1"),
    ],
)
def test_what_an_own_router_returns_is_checked(route: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(returning(route))


def test_an_own_router_may_write_into_what_it_is_given() -> None:
    routed = draw(returning(lambda view: torch.zeros(4, dtype=torch.int64)))
    assert torch.equal(routed.sequences, draw("H40").sequences)


def test_routers_that_are_none_are_refused() -> None:
    with pytest.raises(TypeError, match="Router has no method route"):
        draw(Router())
    with pytest.raises(TypeError, match="schedule must be made first: EntropyRouter is a class"):
        draw(EntropyRouter)
    with pytest.raises(ValueError, match="chooses between H, L: give these models"):
        mdkern.sample({"A": HEAVY, "B": LIGHT}, EntropyRouter(), length=8, decoder="threshold")


@pytest.mark.gpu
def test_graphs_and_eager_passes_agree() -> None:
    heavy, light = HEAVY.to("cuda"), LIGHT.to("cuda")
    try:
        calls = [
            mdkern.sample(
                heavy,
                light,
                EntropyRouter(lower=3.0, upper=3.5),
                input_ids=starts(11).cuda(),
                seed=3,
                batch_size=4,
                decoder="top_probability",
                steps=40,
                cuda_graphs=graphs,
            )
            for graphs in (True, False)
        ]
    finally:
        HEAVY.to("cpu"), LIGHT.to("cpu")
    assert torch.equal(calls[0].sequences, calls[1].sequences)
    assert all(torch.equal(calls[0].nfe[name], calls[1].nfe[name]) for name in "HL")
