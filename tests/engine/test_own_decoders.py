"""Decoders of one's own: a run ends, with an error that names them, and they write nothing but what may be written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mdkern import adapt, decoders, sample
from mdkern.decoders import Ancestral, Choice, Proposal, Stepwise, View
from mdkern.plan import GIVEN, RevealPlan
from tests.references.slow_sampler import PairModel

LENGTH, VOCAB = 8, 5
MODEL = PairModel(LENGTH, VOCAB)
PROMPT = torch.tensor([[1, 2] + [VOCAB] * 6, [3, VOCAB, 0] + [VOCAB] * 5])
pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")


def draw(decoder: Any, **options: Any) -> Tensor:
    passes = 0

    def logits(input_ids: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        assert passes < 1000, "endless"
        return MODEL.logits(input_ids).float()

    model = adapt(logits, vocab_size=VOCAB, mask_id=VOCAB)
    return sample(model, input_ids=PROMPT, decoder=decoder, **({"steps": 8, "seed": 0} | options)).sequences


class First(Stepwise):
    """The leftmost mask."""

    def choose(self, view: View, proposal: Proposal) -> Choice:
        scores = -view.offset.float()
        return Choice(scores, view.masked, "top_k", quota=torch.ones_like(view.step))


class Nothing(First):
    def choose(self, view: View, proposal: Proposal) -> Choice:
        return replace(super().choose(view, proposal), candidates=torch.zeros_like(view.masked))


class NothingEver(Nothing):
    adaptive = True


class Unmakes(First):
    def remask(self, view: View) -> Tensor:
        return torch.ones_like(view.masked)


class Greedy(First):
    """Whatever there is, the prompt included."""

    def rows(self, view: View) -> Tensor:
        return torch.ones_like(view.masked)

    def choose(self, view: View, proposal: Proposal) -> Choice:
        return Choice(torch.ones_like(proposal.probability), torch.ones_like(view.masked), "threshold", bound=0.5)


class Edits(First):
    """Everything, also where no token was asked for."""

    def edit(self, view: View, proposal: Proposal) -> Tensor:
        return torch.ones_like(view.masked)


class Forgets(First):
    def remask(self, view: View) -> Tensor:
        return (view.block_step < 2)[:, None].expand_as(view.masked)


class Wrong(First):
    def choose(self, view: View, proposal: Proposal) -> Choice:
        return replace(super().choose(view, proposal), candidates=view.masked.float())


class Misshapen(First):
    def edit(self, view: View, proposal: Proposal) -> Tensor:
        return view.revealed[:, :1]


class Scribbles(First):
    """Writes into all that it is shown."""

    def rows(self, view: View) -> Tensor:
        wanted = super().rows(view).clone()
        view.ids.fill_(2)
        view.masked.fill_(True)
        return wanted

    def choose(self, view: View, proposal: Proposal) -> Choice:
        choice = replace(super().choose(view, proposal), candidates=view.masked.clone())
        view.ids.fill_(1)
        view.masked.fill_(True)
        view.revealed.fill_(True)
        view.seed.fill_(7)
        proposal.token.fill_(VOCAB + 3)
        return choice


class NoChoice(First):
    def choose(self, view: View, proposal: Proposal) -> Any:
        return proposal.probability, view.masked


class NoRows(First):
    def rows(self, view: View) -> Any:
        return None


class FewTimes(First):
    def times(self, steps: int) -> Tensor:
        return torch.linspace(1.0, 0.0, steps)


class NoPlan(Ancestral):
    def plan(self, canvas: Any) -> Any:
        return super().plan(canvas).step


class FloatPlan(Ancestral):
    def plan(self, canvas: Any) -> RevealPlan:
        plan = super().plan(canvas)
        return replace(plan, step=plan.step.float())


class Unfitted(First):
    def fitted(self, vocab_size: int, device: torch.device) -> Any:
        return None


class Leaves(Ancestral):
    def plan(self, canvas: Any) -> RevealPlan:
        plan = super().plan(canvas)
        return replace(plan, step=plan.step.index_fill(1, torch.tensor(5), GIVEN))


class Overwrites(Ancestral):
    def plan(self, canvas: Any) -> RevealPlan:
        plan = super().plan(canvas)
        return replace(plan, step=plan.step.clamp(min=0))


@pytest.mark.parametrize("block_length", [None, 3])
@pytest.mark.parametrize("decoder", [Nothing(), NothingEver(), Unmakes()])
def test_a_run_without_progress_ends(decoder: Stepwise, block_length: int | None) -> None:
    with pytest.raises(RuntimeError, match=rf"sample 0: after \d+ passes {type(decoder).__name__} has left \d masks"):
        draw(decoder, block_length=block_length, steps=None)


@pytest.mark.parametrize("decoder", [First(), Greedy(), Edits(), Forgets(), Scribbles()])
@pytest.mark.parametrize("block_length", [None, 8])
def test_only_what_is_wanted_is_written(decoder: Stepwise, block_length: int | None) -> None:
    sequences = draw(decoder, block_length=block_length)
    given = PROMPT != VOCAB
    assert torch.equal(sequences[given], PROMPT[given])
    assert ((sequences >= 0) & (sequences < VOCAB)).all()


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (Wrong(), r"Wrong: choose's candidates must be torch.bool \[2, 8\], not torch.float32 \[2, 8\]"),
        (Misshapen(), r"Misshapen: edit must be torch.bool \[2, 8\], not torch.bool \[2, 1\]"),
        (NoChoice(), "NoChoice: choose must return a Choice, not tuple"),
        (NoRows(), r"NoRows: rows must be torch.bool \[2, 8\], not NoneType"),
        (FewTimes(), r"FewTimes: times must be \[9\] for 8 steps, not \[8\]"),
        (NoPlan(), "NoPlan: plan must return a RevealPlan of int64, not Tensor"),
        (FloatPlan(), "FloatPlan: plan must return a RevealPlan of int64, not steps of torch.float32"),
        (Unfitted(), "Unfitted: fitted must return the decoder, not NoneType"),
        (Leaves(), "Leaves: plan must give every masked position a step from 0 to 8 and all others -1"),
        (Overwrites(), "Overwrites: plan must give every masked position a step"),
    ],
)
def test_answers_that_cannot_be_right_are_refused(decoder: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(decoder)


def test_what_a_decoder_writes_into_its_view_does_not_count() -> None:
    assert torch.equal(draw(Scribbles()), draw(First()))


def test_a_run_without_progress_ends_whatever_the_decoder_is_called() -> None:
    class Called(NothingEver, name="nothing"):
        """Found by its name, as mdkern's own are."""

    try:
        with pytest.raises(RuntimeError, match=r"after \d+ passes Called has left \d masks"):
            draw("nothing", steps=None)
    finally:
        del decoders.DECODERS["nothing"]
