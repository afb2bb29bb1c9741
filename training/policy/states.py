"""States of decoding, with what was right in them: what a filter is fitted to (Learn2PD, 2509.25188).

A text's *reference* is what its model writes one position at a time, always the one whose token is the most probable.
A proposal is right if it is the reference's token. Two kinds of states are collected, which hold tokens of the
reference only: those of the run that writes the reference, and those of an *oracle* run, in which each pass reveals all
that is right. At a temperature above 0, a position's noise is the same at every step, so that the reference is a
function of the prompt and the noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import mdkern
from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.policy import features
from mdkern.engine.progress import Settings
from mdkern.engine.propose import propose_drawn
from mdkern.engine.resolve import resolve
from mdkern.engine.slots import Slots
from mdkern.engine.state import SamplerState
from mdkern.evaluation.exact import run_forced
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head


@dataclass(frozen=True)
class States:
    """Masked positions of all states, one after the other."""

    inputs: Tensor  # float32 [M, 10], `mdkern.decoders.policy.features`
    right: Tensor  # bool [M], whether the proposed token is the reference's
    text: Tensor  # int64 [M], number of the text
    counts: Tensor  # bool [M], False where it is revealed whatever a filter says

    @staticmethod
    def join(parts: list[States]) -> States:
        return States(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS))

    def only(self, rows: Tensor) -> States:
        return States(*(getattr(self, name)[rows] for name in FIELDS))


FIELDS = "inputs", "right", "text", "counts"


@dataclass
class Recorder:
    """Keeps what a decoder is shown of masked positions."""

    outcomes: int
    block_length: int
    inputs: list[Tensor] = field(default_factory=list)
    token: list[Tensor] = field(default_factory=list)
    sample: list[Tensor] = field(default_factory=list)
    position: list[Tensor] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)

    def note(self, view: View, proposal: Proposal) -> None:
        masked = view.masked
        inputs = features(masked, view.offset, proposal, self.outcomes, self.block_length)
        score = torch.where(masked, proposal.probability, -1.0)
        best = torch.zeros_like(masked).scatter_(1, score.argmax(-1, keepdim=True), True)
        noted = inputs, proposal.token, view.keys[..., 0], view.keys[..., 1], best
        for kept, values in zip((self.inputs, self.token, self.sample, self.position, self.best), noted):
            kept.append(values[masked])

    def states(self, reference: Tensor, first: int, leave_out_best: bool, last: Tensor | None = None) -> States:
        """What was noted, held against ``reference [N, L]`` of samples ``first``, first + 1, ...

        Positions after ``last [N]`` do not count.
        """
        sample, position = torch.cat(self.sample), torch.cat(self.position)
        right = torch.cat(self.token) == reference[sample - first, position]
        counts = ~torch.cat(self.best) if leave_out_best else torch.ones_like(right)
        counts &= True if last is None else position <= last[sample - first]
        return States(torch.cat(self.inputs), right, sample, counts)


@dataclass(frozen=True, eq=False)
class ReferenceRun(Stepwise):
    """The position whose token is the most probable, alone."""

    adaptive: ClassVar[bool] = True
    wants_top: ClassVar[bool] = True
    wants_entropy: ClassVar[bool] = True

    recorder: Recorder | None = None
    fresh_noise: bool = False

    def choose(self, view: View, proposal: Proposal) -> Choice:
        if self.recorder is not None:
            self.recorder.note(view, proposal)
        return Choice(proposal.probability, view.masked, "top_k", quota=torch.ones_like(view.step))


@dataclass(frozen=True, eq=False)
class OracleRun(Stepwise):
    """All positions whose token is the reference's. A block is over when a pass proposes what the one before it did, or
    nothing that is right; it then takes the reference's tokens.

    `run_oracle` puts the reference's tokens in the place of the proposed ones.
    """

    adaptive: ClassVar[bool] = True
    wants_top: ClassVar[bool] = True
    wants_entropy: ClassVar[bool] = True

    recorder: Recorder
    reference: Tensor  # int64 [N, L]
    first: int  # number of its first sample
    last: Tensor  # int64 [N, L], what the pass before proposed
    fresh_noise: bool = False

    def choose(self, view: View, proposal: Proposal) -> Choice:
        self.recorder.note(view, proposal)
        masked, token = view.masked, proposal.token
        row, position = (view.keys[..., 0] - self.first).clamp(min=0), view.keys[..., 1]
        right = masked & (token == self.reference[row, position])
        same = ~(masked & (token != self.last[row, position])).any(-1)
        self.last[row[masked], position[masked]] = token[masked]
        over = same | ~right.any(-1)
        return Choice(proposal.probability, torch.where(over[:, None], masked, right), "threshold")


def run_oracle(denoiser: Denoiser, input_ids: Tensor, decoder: OracleRun, **options: Any) -> None:
    """Run the oracle for ``input_ids [N, L]``; its recorder has the states."""
    rows = torch.cat((decoder.reference, torch.zeros_like(decoder.reference[:1])))

    def propose(
        head: Head, settings: Settings, state: SamplerState, slots: Slots, wanted: Tensor, hidden: Tensor
    ) -> tuple[Proposal, Proposal]:
        shown, _ = propose_drawn(head, settings, state, slots, wanted, hidden)
        true = rows[slots.sequence].gather(1, slots.column)
        return shown, shown._replace(token=torch.where(shown.token < 0, -1, true))

    run_forced(resolve(denoiser, input_ids=input_ids, decoder=decoder, **options), propose)


def collect(
    denoiser: Denoiser,
    input_ids: Tensor,
    first: int,
    block_length: int,
    temperature: float,
    seed: int,
    end_id: int | None = None,
) -> tuple[States, Tensor]:
    """The states of both kinds of runs, and the references, int64 ``[N, L]``.

    Args:
        input_ids: int64 ``[N, L]``, with masks.
        first: number of the first text, which with the others' keys its noise.
        end_id: what is written after the first of this id does not count; None: all counts.
    """
    count = len(input_ids)
    options: dict[str, Any] = {
        "block_length": block_length,
        "temperature": temperature,
        "seed": seed,
        "sample_ids": list(range(first, first + count)),
        "batch_size": count,
    }
    plain, oracle = (Recorder(denoiser.vocab_size - 1, block_length) for _ in range(2))
    out = mdkern.sample(
        denoiser, input_ids=input_ids, decoder=ReferenceRun(plain), cuda_graphs=False, progress=False, **options
    )
    reference = out.sequences
    assert reference is not None
    decoder = OracleRun(oracle, reference, first, torch.full_like(reference, -1))
    run_oracle(denoiser, input_ids, decoder, **options)
    last = None
    if end_id is not None:
        ends = (reference == end_id) & (input_ids == denoiser.mask_id)
        last = torch.where(ends.any(-1), ends.int().argmax(-1), reference.shape[1])
    kinds = plain.states(reference, first, True, last), oracle.states(reference, first, False, last)
    return States.join(list(kinds)), reference
