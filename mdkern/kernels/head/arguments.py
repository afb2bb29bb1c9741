"""What the operators of the output layer are given, in the bundles that travel together."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

Of = Literal["model", "sampler"]
TopPRule = Literal["reach", "within"]


class Head(NamedTuple):
    """An output layer: ``logits = cap(scale * hidden @ weight.T) + bias``, ``cap(x) = c * tanh(x / c)``."""

    weight: Tensor | None  # [V, D]; None: the rows of `hidden` are the logits (D = V)
    bias: Tensor | None  # float32 [V]
    scale: float
    soft_cap: float  # c; 0: none

    def vocab(self, hidden: Tensor) -> int:
        """V."""
        return hidden.shape[1] if self.weight is None else self.weight.shape[0]


class Rows(NamedTuple):
    """Which rows of `hidden`, and how a token is drawn for each. All tensors are on its device."""

    row_index: Tensor  # int32 or int64 [M]
    row_count: Tensor | None  # int32 or int64 []: only the first so many are computed; None: all
    temperature: Tensor | None  # float32 [M]; None: `uniform_temperature` for all
    uniform_temperature: float
    seed: Tensor  # int64 []
    keys: Tensor  # int64 [M, 3]: sample number, position, step

    def contiguous(self) -> Self:
        """The same with contiguous tensors, as the kernels read them."""
        temperature = None if self.temperature is None else self.temperature.contiguous()
        return self._replace(
            row_index=self.row_index.contiguous(), temperature=temperature, keys=self.keys.contiguous()
        )

    def part(self, rows: slice) -> Self:
        """The rows of a slice that starts at one of them."""
        count = self.row_count
        return self._replace(
            row_index=self.row_index[rows],
            row_count=(count - rows.start).clamp_(min=0) if count is not None and rows.start else count,
            temperature=None if self.temperature is None else self.temperature[rows],
            keys=self.keys[rows],
        )


class Wanted(NamedTuple):
    """Which statistics are returned."""

    want_top: bool
    want_entropy: bool
    of: str = "model"  # whose distribution they are of, see `vocab_projection`


class Filters(NamedTuple):
    """Which ids a token is drawn from, see `vocab_projection`."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_p_rule: str = "reach"

    def active(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def check(self) -> None:
        """Raise ValueError unless each of them means something."""
        if self.top_k < 0 or not 0.0 < self.top_p <= 1.0 or not 0.0 <= self.min_p <= 1.0:
            raise ValueError(
                "top_k must be at least 0, top_p in (0, 1] and min_p in [0, 1], "
                f"not {self.top_k}, {self.top_p} and {self.min_p}"
            )
        if self.top_p_rule not in get_args(TopPRule):
            raise ValueError(f"top_p_rule must be one of {', '.join(get_args(TopPRule))}, not {self.top_p_rule!r}")


NO_FILTERS = Filters()
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # token, log_prob, top1, top2, entropy, logsumexp


def empty_outputs(hidden: Tensor, head: Head, rows: Rows, wanted: Wanted, filters: Filters | None = None) -> Outputs:
    """What `vocab_projection` fills in, on `hidden`'s device; what is not wanted has no elements."""
    capacity = rows.row_index.shape[0]

    def statistic(wanted: bool = True) -> Tensor:
        return hidden.new_empty(capacity if wanted else 0, dtype=torch.float32)

    token = hidden.new_empty(capacity, dtype=torch.int64)
    top = wanted.want_top
    return token, statistic(), statistic(top), statistic(top), statistic(wanted.want_entropy), statistic()
