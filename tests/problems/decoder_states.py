"""States in the middle of a run, for the tests of decoders: random texts, and what decoders make of them."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mdkern.decoders import DECODERS, Edit, ReMDM, TopProbability
from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.kernels import select
from mdkern.kernels.head.reference import row_statistics
from tests.references import decoding_rules as reference

MASK = 0  # no logit of it above -inf
FREQUENCY = torch.tensor(reference.FREQUENCY)
VOCAB = len(FREQUENCY)


def make_decoder(case: reference.Case) -> Stepwise:
    """The package's decoder of a case; its lists are tensors."""
    parameters = {
        key: torch.tensor(value) if isinstance(value, list) else value for key, value in case.parameters.items()
    }
    decoder: Stepwise = DECODERS[case.decoder](**parameters)
    return decoder


STEPWISE: dict[str, Stepwise] = {name: make_decoder(case) for name, case in reference.CASES.items()} | {
    "top_probability, warm": TopProbability(position_temperature=0.1),
    "remdm cap": ReMDM("cap", 0.3),
    "remdm rescale": ReMDM("rescale", 0.3),
    "remdm conf": ReMDM("conf"),
    "remdm loop": ReMDM("loop", 0.3),
    "edit": Edit(),
}


class State(NamedTuple):
    """B texts of L positions in the middle of a run, each with a block of R positions of its own."""

    logits: Tensor  # float64 [B, L, V]
    ids: Tensor  # int64 [B, L]
    prompt: Tensor  # bool [B, L]
    start: Tensor  # int64 [B]
    view: View

    @property
    def columns(self) -> Tensor:
        """int64 ``[B, R]``: positions of the block."""
        return self.start[:, None] + torch.arange(self.view.ids.shape[1])


@cache
def random_state(trial: int, batch: int = 24, tied: bool = False) -> State:
    """Random logits, masks, prompts and blocks; among the texts some all masked and some with one mask."""
    generator = torch.Generator().manual_seed(trial)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    length = int(integers(4, 25))
    width = int(integers(1, length + 1))
    logits = torch.randn(batch, length, VOCAB, generator=generator, dtype=torch.float64) * 2.5
    if tied:
        logits = (logits / 2).round()
    logits[..., MASK] = -torch.inf
    start = integers(0, length - width + 1, batch)
    masked = torch.rand(batch, length, generator=generator) < torch.rand(batch, 1, generator=generator)
    masked[: batch // 4] = True
    masked[batch // 4 : batch // 2] = False
    masked[torch.arange(batch), start + integers(0, width, batch)] = True  # at least one in the block
    ids = integers(1, VOCAB, batch, length).masked_fill(masked, MASK)
    prompt = ~masked & (torch.rand(batch, length, generator=generator) < 0.5)

    columns = start[:, None] + torch.arange(width)
    block_steps = integers(1, 9, batch)
    step = integers(0, 840, batch) % block_steps
    sample = torch.arange(batch)[:, None].expand(batch, width)
    view = View(
        ids=ids.gather(1, columns),
        masked=masked.gather(1, columns),
        revealed=(~masked & ~prompt).gather(1, columns),
        offset=columns - start[:, None],
        step=step,
        steps=block_steps,
        block_step=step,
        block_steps=block_steps,
        block_masked=masked.gather(1, columns).sum(-1) + integers(0, 5, batch),
        confidence=torch.rand(batch, width, generator=generator),
        seed=torch.tensor(trial),
        keys=torch.stack((sample, columns, step[:, None].expand(batch, width)), -1),
    )
    return State(logits, ids, prompt, start, view)


Statistics = tuple[Tensor, Tensor]  # token [B, R]; probability, top1, top2, entropy [4, B, R]


@cache
def exact_statistics(trial: int, tied: bool) -> Statistics:
    """Of the block's rows of `random_state`, from the references: rows with permuted logits have equal ones."""
    state = random_state(trial, tied=tied)
    rows = [[rows_of(trial, tied, b)[i] for i in block_of(state, b)] for b in range(len(state.ids))]
    values = torch.tensor([[row[1:] for row in text] for text in rows], dtype=torch.float64)
    return torch.tensor([[row.token for row in text] for text in rows]), values.float().movedim(-1, 0)


def fast_statistics(state: State) -> Statistics:
    """Of the block's rows, as `vocab_projection` has them."""
    logits = state.logits.gather(1, state.columns[..., None].expand(-1, -1, VOCAB)).flatten(0, 1)
    keys = torch.zeros(len(logits), 3, dtype=torch.int64)
    token, parts = row_statistics(logits.float(), torch.zeros(len(logits)), torch.tensor(0), keys)
    values = torch.stack((parts[0].exp(), *parts[1:4]))
    return token.view(state.view.ids.shape), values.view(4, *state.view.ids.shape)


def propose(decoder: Stepwise, state: State, statistics: Statistics | None = None) -> Proposal:
    """The statistics that a decoder asks for, and no others."""
    token, values = statistics or fast_statistics(state)
    wanted = decoder.rows(state.view)
    probability, top1, top2, entropy = torch.where(wanted, values, torch.nan)
    top = (top1, top2) if decoder.wants_top else (None, None)
    return Proposal(torch.where(wanted, token, -1), probability, *top, entropy if decoder.wants_entropy else None)


def reveal(state: State, choice: Choice, tokens: Tensor) -> list[dict[int, int]]:
    """What `select` writes into the texts, by position; nothing else may change."""
    before = state.ids.gather(1, state.columns)
    after = before.clone()
    written = select(
        choice.scores, choice.candidates, tokens, after, choice.rule, quota=choice.quota, bound=choice.bound,
        temperature=choice.temperature, seed=state.view.seed, keys=state.view.keys,
    )  # fmt: skip
    assert torch.equal(after[~written], before[~written])
    columns = state.columns.tolist()
    return [{columns[b][r]: int(after[b, r]) for r in written[b].nonzero()[:, 0].tolist()} for b in range(len(written))]


def block_of(state: State, b: int) -> range:
    return range(int(state.start[b]), int(state.start[b]) + state.view.ids.shape[1])


@cache
def rows_of(trial: int, tied: bool, b: int) -> list[reference.Row | None]:
    """The references' statistics of one text of `random_state`, by position; None outside of its block."""
    state = random_state(trial, tied=tied)
    block = block_of(state, b)
    return [reference.row_statistics(row) if i in block else None for i, row in enumerate(state.logits[b].tolist())]


def one_row(view: View, b: int) -> View:
    batch = view.ids.shape[0]
    tensors = {
        field.name: value[b : b + 1]
        for field in dataclasses.fields(view)
        if isinstance(value := getattr(view, field.name), Tensor) and value.ndim and value.shape[0] == batch
        and field.name != "times"
    }  # fmt: skip
    return dataclasses.replace(view, **tensors)


def quota_view(masked: Tensor, step: int, steps: int, block_masked: Tensor | None = None) -> View:
    """A view of which only what a quota reads matters."""
    batch, width = masked.shape
    zeros = torch.zeros(batch, width, dtype=torch.int64)
    steps_now, counts = torch.full((batch,), step), torch.full((batch,), steps)
    return View(
        ids=zeros, masked=masked, revealed=~masked, offset=zeros, step=steps_now, steps=counts, block_step=steps_now,
        block_steps=counts, block_masked=masked.sum(-1) if block_masked is None else block_masked,
        confidence=zeros.float(), seed=torch.tensor(0),
        keys=zeros[..., None].expand(-1, -1, 3),
    )  # fmt: skip


def first_masked(counts: list[int], width: int) -> Tensor:
    return torch.arange(width)[None, :] < torch.tensor(counts)[:, None]
