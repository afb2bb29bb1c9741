"""The interface of decoders: rules, as pure tensor functions, that say which positions are revealed at a step.

There are two kinds. The order of a `Planned` decoder does not depend on the model, so it draws a `RevealPlan` before
the first forward pass, and steps that reveal nothing are not run. A `Stepwise` decoder looks at the model's row
statistics, or puts revealed positions back to mask, so it is called at every step; its inputs and outputs stay on the
device. The sampler runs the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from mdkern.kernels.loop.select import Rule
from mdkern.plan import RevealPlan


@dataclass(frozen=True)
class Canvas:
    """What a `Planned` decoder is given: N sequences of L positions before anything is revealed."""

    masked: Tensor  # bool [N, L], the positions to be revealed
    block: Tensor  # int64 [N, L], block of each position, 0..blocks-1; 0 where not masked
    blocks: Tensor  # int64 [N, 1], number of blocks of each sequence; 1: no blocks
    steps: Tensor  # int64 [N, 1], T of each sequence, over all its blocks; a multiple of `blocks`
    seed: Tensor  # int64 []
    sample: Tensor  # int64 [N], sample numbers, which key the draws
    position: Tensor  # int64 [N, L], positions in the text, padding not counted, which also key the draws

    @property
    def block_steps(self) -> Tensor:
        """int64 ``[N, 1]``: number of steps of each block of a sequence."""
        return self.steps // self.blocks

    def only(self, rows: Tensor) -> Canvas:
        """The canvas of the sequences ``rows``, int64 ``[n]``."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Canvas(**{name: part[rows] if part.ndim else part for name, part in parts.items()})


DECODERS: dict[str, type[Any]] = {}  # by name


class Decoder:
    """Base of all decoders, which are frozen dataclasses of their parameters.

    A class can be given a name for ``decoder=``, as in ``class Threshold(Stepwise, name="threshold")``.
    """

    @property
    def batch_invariant(self) -> bool:
        """Whether its choices for a text have the same bits whatever the other texts, and the columns after it. Sums in
        floating point over a text do not, as their order depends on the number of columns."""
        return True

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is None:
            return
        taken = DECODERS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"decoder {cls.__name__}: the name {name!r} is taken by {taken.__name__}")
        DECODERS[name] = cls

    def fitted(self, vocab_size: int, device: torch.device) -> Self:
        """This decoder with its tensors on the device.

        Raises:
            ValueError: a tensor is for another size of vocabulary.
        """
        return self

    def times(self, steps: int) -> Tensor:
        """float64 ``[steps + 1]``: diffusion time t before each step and after the last one; linear from 1 to 0."""
        return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


class Planned(Decoder):
    """A decoder whose order does not depend on the model."""

    def plan(self, canvas: Canvas) -> RevealPlan:
        """Draw when each position is revealed."""
        raise NotImplementedError


@dataclass
class View:
    """What a `Stepwise` decoder is given at a step: B sequences and the R positions of the current block of each."""

    ids: Tensor  # int64 [B, R], as they are now
    masked: Tensor  # bool [B, R], still to be revealed
    revealed: Tensor  # bool [B, R], revealed by the sampler, not prompt or padding: may be edited or remasked
    offset: Tensor  # int64 [B, R], position counted from the start of the block
    step: Tensor  # int64 [B], step of the whole run, 0..steps-1
    steps: Tensor  # int64 [B], T of each sequence
    block_step: Tensor  # int64 [B], step within the block, from 0
    block_steps: Tensor  # int64 [B], number of steps that a block is meant to take (T / blocks)
    block_masked: Tensor  # int64 [B], number of masked positions of the block when it began
    confidence: Tensor  # float32 [B, R], probability of the token when it was revealed; 1 where given
    seed: Tensor  # int64 []
    keys: Tensor  # int64 [B, R, 3], sample, position in the text and step, which key every draw


class Proposal(NamedTuple):
    """The model's proposal for a `View`, ``[B, R]`` each; NaN (token -1) where `Stepwise.rows` did not ask for one."""

    token: Tensor  # int64, the token drawn
    probability: Tensor  # float32, its probability
    top1: Tensor | None = None  # float32, largest probability; if `wants_top`
    top2: Tensor | None = None
    entropy: Tensor | None = None  # float32, nats; if `wants_entropy`


@dataclass(frozen=True)
class Choice:
    """Which positions are revealed: the scores, candidates and rule for `mdkern.kernels.select`."""

    scores: Tensor  # float32 [B, R]
    candidates: Tensor  # bool [B, R]
    rule: Rule
    quota: Tensor | None = None  # int64 [B]
    bound: float = 0.0
    temperature: float = 0.0


class Stepwise(Decoder):
    """A decoder that is called at every step.

    All methods are given the same `View` of a step, the state before it: reveals, edits and remasks of a step happen at
    once, and none of them sees another. What is decided for a sequence must not depend on the other sequences.
    """

    wants_top: ClassVar[bool] = False  # whether `Proposal` has top1 and top2
    wants_entropy: ClassVar[bool] = False
    # Whether `choose` reads the drawn token or its probability, so that what is revealed depends on what is drawn.
    scores_draw: ClassVar[bool] = True
    # Whether the decoder determines the number of steps. A block then ends with its last mask, however many steps
    # that takes, and the schedule's step is the share of the text revealed. Otherwise a block takes `block_steps`.
    adaptive: ClassVar[bool] = False
    # Which distribution the statistics of `Proposal` describe: the "model"'s, or the "sampler"'s, which is after
    # temperature and filters, see `mdkern.kernels.vocab_projection`.
    of: str = "model"
    # Whether the decoder needs temperature 0, because it takes the drawn token for the most probable one.
    greedy: ClassVar[bool] = False
    # Whether a position's token is drawn with new noise at each step. If not, what is proposed for it changes only with
    # the model's distribution.
    fresh_noise: bool = True
    only_block_length: int | None = None  # the one that the decoder can be used with; None: any, or no blocks
    # Whether the model is given the revealed tokens of the block as mixtures with the mask, see `mdkern.models.soft`.
    # `rows` must then ask for all of them, and the decoder must be `greedy`.
    soft: bool = False
    closing_steps: int = 0  # most steps of a block after its last mask is gone; it ends when a step changes nothing

    def rows(self, view: View) -> Tensor:
        """bool ``[B, R]``: the positions at which the output layer runs. Default: all masked ones."""
        return view.masked

    def choose(self, view: View, proposal: Proposal) -> Choice:
        """Choose the masked positions that get their proposed token.

        An `adaptive` decoder must choose at least one in every sequence that has masks, because its run ends with the
        last mask. A decoder that stops revealing ends the run with a RuntimeError. Candidates that are not masked are
        ignored.
        """
        raise NotImplementedError

    def edit(self, view: View, proposal: Proposal) -> Tensor | None:
        """bool ``[B, R]``: revealed positions that take the proposed token instead. None: the decoder never edits."""
        return None

    def remask(self, view: View) -> Tensor | None:
        """bool ``[B, R]``: revealed positions to mask again after the step. None: the decoder never remasks."""
        return None

    def settled(self, view: View, proposal: Proposal) -> Tensor | None:
        """bool ``[B]``, of an `adaptive` decoder: whether a block that has no masks after this step is over with it.

        Such a block is also over if the step changed nothing, or if it was the R-th, R being the number of positions of
        a block, or of the text if there are no blocks. None: `closing_steps` says when a block is over.
        """
        return None


def settles(decoder: Decoder) -> bool:
    """Whether a decoder says by `settled` when a block is over."""
    return isinstance(decoder, Stepwise) and type(decoder).settled is not Stepwise.settled


def keeps_blocks(decoder: Decoder) -> bool:
    """Whether blocks must keep the length that was asked for, also where one of them holds all that is masked."""
    return settles(decoder) or (isinstance(decoder, Stepwise) and decoder.only_block_length is not None)


def even_quota(view: View) -> Tensor:
    """LLaDA's quota, int64 ``[B]``: the block's masks split evenly over its steps, one more in each of the first steps
    where they do not divide evenly.

    It is at least 1 while something is masked; at the block's last step it is all that is left.
    """
    share, extra = view.block_masked // view.block_steps, view.block_masked % view.block_steps
    quota = share + (view.block_step < extra)
    left = view.masked.sum(-1)
    return torch.where(view.block_step >= view.block_steps - 1, left, quota.clamp(min=1))
