"""What all denoisers of other people's models have in common, whether they are split or run by their logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser
from mdkern.models.dit import gather_rows
from mdkern.models.hf.introspect import accepted_arguments


class Padding(NamedTuple):
    """How a model is told of padding. A tuple: graphs are found by its items."""

    way: str = ""  # in its "attention", to the call as a mask of dtype "bool" or "int64", "untried", or not at all
    first_position: int | None = None  # position ids are told, too, this one at a text's first token
    right_only: bool = False  # what comes before a text would change it all the same

    def arguments(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """Of the model's call, for a mask bool ``[B, L]``, False at padding; none without a mask."""
        if attention_mask is None:
            return {}
        told = {} if self.first_position is None else {"position_ids": self.positions(input_ids, attention_mask)}
        if self.way in ("bool", "int64"):
            told["attention_mask"] = attention_mask.long() if self.way == "int64" else attention_mask
        return told

    def positions(self, input_ids: Tensor | None, attention_mask: Tensor) -> Tensor:
        """int64 ``[B, L]``: of each token in its text; padding before it has the position of its first token.

        Where positions begin beyond 0, the id before the first one is the padding's, wherever it stands (RoBERTa).
        """
        if not self.first_position:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        assert input_ids is not None
        pad_id = self.first_position - 1
        counted = (attention_mask & (input_ids != pad_id)).long()
        return counted.cumsum(-1) * counted + pad_id


class AdaptedDenoiser(Denoiser):
    """Somebody's model, run by its own forward."""

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        vocab_size: int,
        mask_id: int,
        name: str,
        eos_ids: tuple[int, ...] = (),
        max_length: int | None = None,
        num_blocks: int | None = None,
        shifted: bool = False,
    ) -> None:
        """`vocab_size`: how many columns of its logits are ids; the other arguments as in `adapt`."""
        self.model, self.name, self.shifted = model, name, shifted
        # A mask id one past the logits is as common as one inside: the vocabulary then has one id more than columns.
        self.columns, self.vocab_size, self.mask_id = vocab_size, max(vocab_size, mask_id + 1), mask_id
        self.eos_ids, self.max_length, self.num_blocks = eos_ids, max_length, num_blocks
        self.time_conditioning = "t" in accepted_arguments(model)

    def tell_padding(self, padding: Padding) -> None:
        """Tell the model of padding in this way from now on."""
        self.padding = padding
        self.takes_attention_mask, self.right_padding_only = bool(padding.way), padding.right_only

    def suppress(self, bias: Tensor) -> Tensor:
        """``bias [V]`` of the output layer, made ``-inf`` where nothing may ever be produced."""
        bias[self.columns :] = -torch.inf
        if self.mask_id < len(bias):
            bias[self.mask_id] = -torch.inf
        return bias

    def wanted(
        self, states: Tensor, input_ids: Tensor, positions: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """``states [B, L, D]`` that serve `positions`, ``[B, R, D]``, or those of all positions."""
        if self.shifted:
            positions = serving(input_ids, positions, attention_mask)
        return states if positions is None else gather_rows(states, positions)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.model, nn.Module):
            yield from self.model.named_parameters()


def serving(input_ids: Tensor | None, positions: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Where a model whose logits are those of the next position has the state of `positions`, all of them for None.

    One before; at the start of a text, after nothing or after padding, the position's own, as Dream's generation has
    it at position 0.
    """
    if positions is None:
        assert input_ids is not None
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    before = (positions - 1).clamp(min=0)
    return before if attention_mask is None else torch.where(attention_mask.gather(1, before), before, positions)
