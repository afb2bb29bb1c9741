"""DMax's soft parallel decoding: what was revealed is revised in every pass, and re-enters the model as a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_flag, check_number


@dataclass(frozen=True)
class SoftParallel(Stepwise, name="soft_parallel"):
    """Reveal from the left up to the first doubt, and revise all that is revealed until the block is settled.

    In every pass the masked positions from the left that have p >= `threshold`, up to the first that has less, take
    their most probable token, at least the leftmost one. Positions between them that are revealed already do not count.
    All revealed positions of the block take the token that is now the most probable, however probable it is. The prompt
    is never changed.

    A block without masks is over as soon as p >= `confident` at all its positions in one pass, or a pass changed
    nothing, or it has had as many passes as a block has positions (without blocks, as the text has). Each sequence
    ends its blocks by itself.

    With `soft`, the model's input at a revealed position of the block is no longer the embedding of its token, but a
    mixture with that of the mask, by the probability that the last pass gave the token (`mdkern.models.soft`). This is
    for models that were trained for it; others get worse by it. Finished blocks are read as tokens. It needs a model
    whose input embedding mdkern can reach, and no guidance.

    It needs temperature 0. The rule is that of DMax's code, with the mask left out of the softmax, and without its
    tests over a whole batch.

    Args:
        threshold: DMax's evaluations have 0.5 for mathematics and 0.65 for code.
        confident: 0.9 in DMax's code.
        soft: False: revision alone, with any model.
    """

    adaptive: ClassVar[bool] = True
    greedy: ClassVar[bool] = True

    threshold: float = 0.5
    confident: float = 0.9
    soft: bool = True

    def __post_init__(self) -> None:
        check_number(self, "threshold", 0.0, 1.0)
        check_number(self, "confident", 0.0, 1.0)
        check_flag(self, "soft")

    @property
    def batch_invariant(self) -> bool:
        return not self.soft  # PyTorch sums the lengths of mixtures, in an order that depends on their number

    def rows(self, view: View) -> Tensor:
        return view.masked | view.revealed

    def choose(self, view: View, proposal: Proposal) -> Choice:
        doubted = view.masked & ~(proposal.probability >= self.threshold)
        run = view.masked & (doubted.cumsum(-1) == 0)
        leftmost = view.masked & (view.masked.cumsum(-1) == 1)
        return Choice(proposal.probability, run | leftmost, "threshold", bound=0.0)  # all of these

    def edit(self, view: View, proposal: Proposal) -> Tensor:
        return view.revealed & (proposal.token != view.ids)

    def settled(self, view: View, proposal: Proposal) -> Tensor:
        ours = view.masked | view.revealed
        return ~(ours & ~(proposal.probability >= self.confident)).any(-1)
