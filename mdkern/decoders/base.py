"""What decoders are: rules that say which positions are revealed at a step, as pure tensor functions.

Two kinds. The order of a `Planned` decoder does not depend on the model, so it draws a `RevealPlan` before the first
forward pass, and steps that reveal nothing are not run. A `Stepwise` decoder looks at the model's row statistics (or
puts revealed positions back to mask), so it is asked at every step; all that it is given and gives stays on the device.
The loop belongs to the sampler.
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
    """What a `Planned` decoder sees: N sequences of L positions before anything is revealed."""

    masked: Tensor  # bool [N, L], to be revealed
    block: Tensor  # int64 [N, L], block of each position, 0..blocks-1; 0 where not masked
    blocks: Tensor  # int64 [N, 1], of each sequence; 1: no blocks
    steps: Tensor  # int64 [N, 1], T of each sequence, over all its blocks; a multiple of `blocks`
    seed: Tensor  # int64 []
    sample: Tensor  # int64 [N], keys the draws
    position: Tensor  # int64 [N, L], keys them too: position in the text, padding not counted

    @property
    def block_steps(self) -> Tensor:
        """int64 ``[N, 1]``: steps that each sequence takes for a block."""
        return self.steps // self.blocks

    def only(self, rows: Tensor) -> Canvas:
        """These sequences of it, int64 ``[n]``."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Canvas(**{name: part[rows] if part.ndim else part for name, part in parts.items()})


DECODERS: dict[str, type[Any]] = {}  # by name


class Decoder:
    """Base of all decoders, which are frozen dataclasses of their parameters.

    A class with a name, as in ``class Threshold(Stepwise, name="threshold")``, can be asked for by it.
    """

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is None:
            return
        taken = DECODERS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"decoder {cls.__name__}: the name {name!r} is taken by {taken.__name__}")
        DECODERS[name] = cls

    def fitted(self, vocab_size: int, device: torch.device) -> Self:
        """This decoder with its tensors, if it has any, on the device; refused if the vocabulary is not theirs."""
        return self

    def times(self, steps: int) -> Tensor:
        """float64 ``[steps + 1]``: diffusion time t before each step and after the last; linear from 1 to 0."""
        return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


class Planned(Decoder):
    """A decoder whose order does not depend on the model."""

    def plan(self, canvas: Canvas) -> RevealPlan:
        """Draw when each position is revealed."""
        raise NotImplementedError


@dataclass
class View:
    """What a `Stepwise` decoder sees of one step: B sequences, the R positions of each one's current block."""

    ids: Tensor  # int64 [B, R], as they are now
    masked: Tensor  # bool [B, R], still to be revealed
    revealed: Tensor  # bool [B, R], revealed by the sampler: may be edited or put back to mask; never prompt or padding
    offset: Tensor  # int64 [B, R], position counted from the block's start
    step: Tensor  # int64 [B], step of the whole run, 0..steps-1
    steps: Tensor  # int64 [B], T of each sequence
    block_step: Tensor  # int64 [B], step within the block, 0 at its first
    block_steps: Tensor  # int64 [B], steps that a block of each sequence is meant to take (T / blocks)
    block_masked: Tensor  # int64 [B], masked positions of the block when it began
    confidence: Tensor  # float32 [B, R], probability that the token had when it was revealed; 1 where given
    seed: Tensor  # int64 []
    keys: Tensor  # int64 [B, R, 3], sample, position in the text, step: key of every draw


class Proposal(NamedTuple):
    """Row statistics of a `View`, ``[B, R]`` each; NaN (token -1) where `Stepwise.rows` did not ask for them."""

    token: Tensor  # int64
    probability: Tensor  # float32, of the token
    top1: Tensor | None = None  # float32, largest probability; if `wants_top`
    top2: Tensor | None = None
    entropy: Tensor | None = None  # float32, nats; if `wants_entropy`


@dataclass(frozen=True)
class Choice:
    """Arguments of `mdkern.kernels.select`: which of the candidates are revealed."""

    scores: Tensor  # float32 [B, R]
    candidates: Tensor  # bool [B, R]
    rule: Rule
    quota: Tensor | None = None  # int64 [B]
    bound: float = 0.0
    temperature: float = 0.0


class Stepwise(Decoder):
    """A decoder that is asked at every step.

    All methods of one step are given the same `View`, of the time before anything of the step is written: reveals,
    edits and remasks happen at once, and none of them sees another. Each sequence of a view is decided on its own.
    """

    wants_top: ClassVar[bool] = False  # top1 and top2 of `Proposal`
    wants_entropy: ClassVar[bool] = False
    # Whether `choose` reads the drawn token or its probability, so that what is revealed depends on what is drawn.
    scores_draw: ClassVar[bool] = True
    # Whether the number of steps is the decoder's own affair: a block then ends with its last mask, however many steps
    # that takes, and the schedule's step is the share of the text revealed. Otherwise a block takes `block_steps`.
    adaptive: ClassVar[bool] = False
    # Whose distribution the statistics of `Proposal` are of: the "model"'s, or the "sampler"'s after temperature and
    # filters, see `mdkern.kernels.vocab_projection`.
    of: str = "model"
    closing_steps: int = 0  # steps a block may take after its last mask is gone, until one changes nothing

    def rows(self, view: View) -> Tensor:
        """bool ``[B, R]``: where statistics are wanted, so that the output layer runs there. Default: every mask."""
        return view.masked

    def choose(self, view: View, proposal: Proposal) -> Choice:
        """Which masked positions get their proposed token.

        Of an `adaptive` decoder at least one, wherever something is masked: its run ends with the last mask. A decoder
        that leaves masks for good ends the run with a RuntimeError; candidates that are not masked do not count.
        """
        raise NotImplementedError

    def edit(self, view: View, proposal: Proposal) -> Tensor | None:
        """bool ``[B, R]``: revealed positions that take the proposed token instead. None: the decoder never does."""
        return None

    def remask(self, view: View) -> Tensor | None:
        """bool ``[B, R]``: revealed positions put back to mask after the step. None: the decoder never does."""
        return None


def even_quota(view: View) -> Tensor:
    """LLaDA's quota, int64 ``[B]``: the block's masks split evenly over its steps, the remainder to the first ones.

    Never 0 while something is masked, and all that is left at the block's last step.
    """
    share, extra = view.block_masked // view.block_steps, view.block_masked % view.block_steps
    quota = share + (view.block_step < extra)
    left = view.masked.sum(-1)
    return torch.where(view.block_step >= view.block_steps - 1, left, quota.clamp(min=1))
