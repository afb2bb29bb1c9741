"""The arguments of the output layer's operators, in NamedTuples of those that belong together."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

Of = Literal["model", "sampler"]
TopPRule = Literal["reach", "within"]


class Head(NamedTuple):
    """An output layer: ``logits = cap(scale * hidden @ weight.T) + bias``, ``cap(x) = c * tanh(x / c)``.

    With a `weight_scale`, `weight` is float8_e4m3fn and stands for ``weight * weight_scale[:, None]``.
    """

    weight: Tensor | None  # [V, D]; None: the rows of `hidden` are the logits (D = V)
    bias: Tensor | None  # float32 [V]
    scale: float
    soft_cap: float  # c; 0: no cap
    weight_scale: Tensor | None = None  # float32 [V]: each row of a weight in float8 is multiplied by its entry

    def vocab(self, hidden: Tensor) -> int:
        """The size of the vocabulary, V."""
        return hidden.shape[1] if self.weight is None else self.weight.shape[0]

    def part(self, ids: slice) -> Self:
        """The head of some ids. It must have a weight."""
        assert self.weight is not None
        return self._replace(
            weight=self.weight[ids],
            bias=None if self.bias is None else self.bias[ids],
            weight_scale=None if self.weight_scale is None else self.weight_scale[ids],
        )


class Rows(NamedTuple):
    """Which rows of `hidden` to use, and how to draw a token for each. All tensors are on the device of `hidden`."""

    row_index: Tensor  # int32 or int64 [M]
    row_count: Tensor | None  # int32 or int64 []: number of rows that are computed, the first ones; None: all
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
    """Which statistics to return."""

    want_top: bool
    want_entropy: bool
    of: str = "model"  # the distribution that they describe, see `vocab_projection`
    want_argmax: bool = False


class Filters(NamedTuple):
    """The ids from which a token is drawn, see `vocab_projection`."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_p_rule: str = "reach"

    def active(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def check(self) -> None:
        """Raise ValueError if one of them is out of range."""
        if self.top_k < 0 or not 0.0 < self.top_p <= 1.0 or not 0.0 <= self.min_p <= 1.0:
            raise ValueError(
                "top_k must be at least 0, top_p in (0, 1] and min_p in [0, 1], "
                f"not {self.top_k}, {self.top_p} and {self.min_p}"
            )
        if self.top_p_rule not in get_args(TopPRule):
            raise ValueError(f"top_p_rule must be one of {', '.join(get_args(TopPRule))}, not {self.top_p_rule!r}")


NO_FILTERS = Filters()
# token, log_prob, top1, top2, entropy, logsumexp, argmax
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_outputs(hidden: Tensor, head: Head, rows: Rows, wanted: Wanted, filters: Filters | None = None) -> Outputs:
    """Uninitialised outputs of `vocab_projection` on the device of `hidden`. Those that are not wanted are empty."""
    capacity = rows.row_index.shape[0]

    def statistic(wanted: bool = True) -> Tensor:
        return hidden.new_empty(capacity if wanted else 0, dtype=torch.float32)

    token = hidden.new_empty(capacity, dtype=torch.int64)
    top = wanted.want_top
    argmax = hidden.new_empty(capacity if wanted.want_argmax else 0, dtype=torch.int64)
    return token, statistic(), statistic(top), statistic(top), statistic(wanted.want_entropy), statistic(), argmax
