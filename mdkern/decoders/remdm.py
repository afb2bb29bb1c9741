"""ReMDM (Wang et al., 2503.00307): revealed positions may return to mask."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from mdkern.decoders.base import Choice, Proposal, Stepwise, View
from mdkern.decoders.checks import check_choice, check_number, check_of
from mdkern.kernels import noise

PUBLISHED_ETA = {"cap": 0.008, "rescale": 0.015, "conf": None, "loop": 0.02}  # for T = 1024 and top-p 0.9


@dataclass(frozen=True)
class ReMDM(Stepwise, name="remdm"):
    """At a step t -> s a revealed position is masked again with probability sigma, and a masked one is revealed with
    probability ``(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)``, which keeps the expected share of revealed ones.

    sigma is at most ``sigma_max = (1 - alpha_s) / alpha_t``, so that these are probabilities and the last step reveals
    everything. alpha is ``1 - t``, with t from 1 to 0 over the block's steps. Which positions are revealed does not
    depend on the model, so the output layer runs only where a token is written.

    Args:
        kind: ``"cap"``: sigma = min(eta, sigma_max). ``"rescale"``: sigma = eta * min(1, sigma_max).
            ``"conf"``: sigma_max is distributed over the revealed positions by a softmax of minus the probability that
            each token had when it was revealed.
            ``"loop"``: ancestral until `t_on`; then alpha is held at `alpha_on` with sigma = eta until `t_off`; then
            ancestral again.
        eta: strength of remasking. None: as published for the kind: 0.008, 0.015, none, 0.02.
        t_on, t_off, alpha_on: parameters of ``"loop"``.
        of: for ``"conf"``: probabilities of the ``"model"``, or of the ``"sampler"`` after temperature and filters, as
            in ReMDM's code.
    """

    kind: str = "cap"
    eta: float | None = None
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9
    of: str = "model"

    def __post_init__(self) -> None:
        check_of(self.of)
        check_choice("kind", self.kind, PUBLISHED_ETA)
        if self.kind == "conf":
            if self.eta is not None:
                raise ValueError(f"eta must be None with kind 'conf', which has none, not {self.eta!r}")
        else:
            object.__setattr__(self, "eta", PUBLISHED_ETA[self.kind] if self.eta is None else self.eta)
            check_number(self, "eta", 0.0, 1.0)
        check_number(self, "t_on", 0.0, 1.0, above=True, below=True)
        check_number(self, "t_off", 0.0, self.t_on, above=True, below=True)
        check_number(self, "alpha_on", 0.0, 1.0, above=True, below=True)

    @property
    def batch_invariant(self) -> bool:
        return self.kind != "conf"  # whose softmax is over the columns

    def alpha(self, times: Tensor) -> Tensor:
        """Probability that a position is revealed at time t, float64."""
        if self.kind != "loop":
            return 1.0 - times
        before = (1.0 - times) * (self.alpha_on / (1.0 - self.t_on))
        after = 1.0 - times * ((1.0 - self.alpha_on) / self.t_off)
        return torch.where(times > self.t_on, before, torch.where(times < self.t_off, after, self.alpha_on))

    def rates(self, view: View) -> tuple[Tensor, Tensor]:
        """Probabilities of a reveal and of a remask at each position, float64 ``[B, R]``."""
        time = 1.0 - view.block_step.double() / view.block_steps
        alpha_t = self.alpha(time)[:, None]
        alpha_s = self.alpha(1.0 - (view.block_step + 1).double() / view.block_steps)[:, None]
        largest = torch.where(alpha_t > 0.0, (1.0 - alpha_s) / alpha_t, inf).clamp(max=1.0)
        sigma = self.sigma(view, time[:, None], largest)
        reveal = (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t)
        return reveal.expand(view.ids.shape), sigma.expand(view.ids.shape)

    def sigma(self, view: View, time: Tensor, largest: Tensor) -> Tensor:
        """Probability of a remask, float64 ``[B, 1]`` or ``[B, R]``, from ``time [B, 1]`` and ``largest [B, 1]``."""
        if self.kind == "conf":
            doubt = (-view.confidence.double()).masked_fill(~view.revealed, -inf)
            return largest * doubt.softmax(-1).nan_to_num(0.0)  # NaN where nothing is revealed yet
        assert self.eta is not None
        if self.kind == "rescale":
            return self.eta * largest
        capped = largest.clamp(max=self.eta)
        if self.kind == "cap":
            return capped
        return torch.where((time > self.t_off) & (time <= self.t_on), capped, 0.0)

    def rows(self, view: View) -> Tensor:
        return view.masked & (coins(view) < self.rates(view)[0])

    def choose(self, view: View, proposal: Proposal) -> Choice:
        drawn = self.rows(view)
        return Choice(proposal.probability, drawn, "top_k", quota=drawn.sum(-1))

    def remask(self, view: View) -> Tensor:
        return view.revealed & (coins(view) < self.rates(view)[1])


def coins(view: View) -> Tensor:
    """float64 ``[B, R]`` in (0, 1): one draw per position and step, for its reveal or its remask."""
    sample, position, step = view.keys.unbind(-1)
    zero = torch.zeros_like(sample)
    return noise.uniform(*noise.random_bits(view.seed, sample, position, step, zero, noise.TRANSITION))
