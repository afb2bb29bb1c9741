"""Other people's models in two: the backbone by their own forward, the output layer by mdkern's kernels.

For Hugging Face models and code loaded with ``trust_remote_code`` (LLaDA, Nie et al., 2502.09992; Dream, Ye et al.,
2508.15487), without knowing their architecture: a pass under `HeadPass` gives the input of the output layer. What
else must be known of a model, its `Anatomy`, is found out in `probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head, Live
from mdkern.models.dit import gather_rows
from mdkern.models.hf.intercept import ID_ROOM, HeadPass, KeptAttention, Layout, Turn, WholeAttention, kept_ids
from mdkern.models.hf.introspect import accepted_arguments, check_evaluating, output_layer


class Padding(NamedTuple):
    """How a model is told of padding. A tuple: graphs are found by its items."""

    way: str = ""  # in its "attention", to the call as a mask of dtype "bool" or "int64", or not at all
    first_position: int | None = None  # position ids are told, too, this one at a text's first token
    pad_id: int | None = None  # an id that has no position of its own, wherever it stands, but the one before the first
    right_only: bool = False  # what comes before a text would change it all the same

    def arguments(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Of the model's call, for a mask bool ``[B, L]``, False at padding."""
        told = {} if self.first_position is None else {"position_ids": self.positions(input_ids, attention_mask)}
        if self.way == "bool":
            told["attention_mask"] = attention_mask
        elif self.way == "int64":
            told["attention_mask"] = attention_mask.long()
        return told

    def positions(self, input_ids: Tensor | None, attention_mask: Tensor) -> Tensor:
        """int64 ``[B, L]``: of each token in its text; padding before it has the position of its first token."""
        assert self.first_position is not None
        if self.pad_id is None:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + self.first_position
        assert input_ids is not None
        counted = (attention_mask & (input_ids != self.pad_id)).long()
        return counted.cumsum(-1) * counted + (self.first_position - 1)


@dataclass(frozen=True)
class Anatomy:
    """What was found out about a model."""

    reason: str = ""  # why it can't be split; then the next four are empty
    scale: float = 1.0
    soft_cap: float = 0.0
    bias: bool = False  # whether the output layer has one
    layout: Layout | None = None  # of kept keys and values; None: they can't be kept
    rotary: str = ""  # name of the module that turns queries and keys from 0 on; "": the call takes position_ids
    no_cache: str = "nobody has tried"  # why keys and values can't be kept
    plain: bool = False  # whether it is called without use_cache=False, with which it gives something else
    direction: str = ""  # what it does not see of a text
    padding: Padding | None = None  # None: nobody has tried


class SplitDenoiser(Denoiser):
    """Somebody's module, its forward cut at the output layer."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        vocab_size: int,
        mask_id: int,
        eos_ids: tuple[int, ...] = (),
        max_length: int | None = None,
        num_blocks: int | None = None,
        shifted: bool = False,
        name: str,
    ) -> None:
        self.model, self.name = model, name
        self.vocab_size, self.mask_id = max(vocab_size, mask_id + 1), mask_id
        self.eos_ids, self.max_length, self.num_blocks = eos_ids, max_length, num_blocks
        self.shifted, self.columns = shifted, vocab_size
        self.settle(anatomy)

    def settle(self, anatomy: Anatomy) -> None:
        """Run the model as is right for its anatomy."""
        self.anatomy = anatomy
        accepted = accepted_arguments(self.model)
        self.fixed = {} if anatomy.plain or "use_cache" not in accepted else {"use_cache": False}  # in every call
        self.time_conditioning = "t" in accepted
        self.layout, self.rotary = anatomy.layout, anatomy.rotary
        self.padding = anatomy.padding or Padding()
        self.takes_cache, self.no_cache_reason = anatomy.layout is not None, anatomy.no_cache
        self.takes_attention_mask, self.right_padding_only = bool(self.padding.way), self.padding.right_only

    device = Live(lambda self: output_weight(self.model).device)
    dtype = Live(lambda self: next(self.model.parameters()).dtype)
    head = Live(lambda self: self.head_now())

    def head_now(self) -> Head:
        """The output layer as it is now, with what may never be produced suppressed."""
        weight, anatomy = output_weight(self.model), self.anatomy
        bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        if anatomy.bias:
            bias += anatomy.scale * output_bias(self.model).detach().float()
        bias[self.columns :] = -torch.inf
        if self.mask_id < len(bias):
            bias[self.mask_id] = -torch.inf
        return Head(weight.detach(), bias, anatomy.scale, anatomy.soft_cap)

    def current(self) -> SplitDenoiser:
        """As the model is now. What was found out about it is found out anew if it has other modules or tensors."""
        from mdkern.models.hf.probe import examine

        check_evaluating(self.model)
        anatomy = examine(self.model, self.columns, self.max_length)
        if anatomy.reason:
            raise ValueError(f"{self.name} can't be split as when it was adapted: {anatomy.reason}. Adapt it again")
        now = copy(self)
        if anatomy != self.anatomy:
            now.settle(anatomy)
        now.head, now.device, now.dtype = self.head, self.device, self.dtype
        return now

    def description(self) -> str:
        return "split at its output layer"

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        attention, arguments = None, dict[str, Tensor]()
        if self.padding.way == "attention":
            attention = WholeAttention(attention_mask)
        if attention_mask is not None:
            arguments |= self.padding.arguments(input_ids, attention_mask)
        hidden = self.run(input_ids, t, attention, **arguments)
        if self.shifted:
            return gather_rows(hidden, serving(input_ids, positions, attention_mask))
        return hidden if positions is None else gather_rows(hidden, positions)

    def run(
        self, input_ids: Tensor, t: Tensor | None, attention: Callable[..., Tensor] | None, **arguments: Any
    ) -> Tensor:
        """The output layer's input, ``[B, W, D]``."""
        weight = output_weight(self.model)
        held = vars(self).get("head")  # of this call of `sample`; addresses alone are compared: no device is asked
        if held is not None and (weight.data_ptr() != held.weight.data_ptr() or weight.dtype != held.weight.dtype):
            raise RuntimeError(f"{self.name} got another output layer while it was sampled from")
        if self.time_conditioning:
            arguments["t"] = t
        with HeadPass(weight, attention) as run:
            self.model(input_ids, **self.fixed, **arguments)
        if run.hidden is None:
            raise RuntimeError(f"{self.name} did not run its output layer, which it did when it was adapted")
        return run.hidden.to(weight.dtype)

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        assert self.layout is not None
        return self.layout.shape(batch, length, ID_ROOM if self.shifted else 0)

    def window_hidden(
        self,
        cache: Tensor,
        input_ids: Tensor,
        columns: Tensor | None,
        positions: Tensor,
        t: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `Denoiser.window_hidden`; of a shifted model a window must be one run of columns.

        The state that serves such a window's first column is that of the column before it, which is run with it and
        attends like the window, but whose own keys and values stay as they were kept. Its id is kept for that.
        """
        assert self.layout is not None
        if columns is None:
            if self.shifted:
                kept_ids(cache)[:, :-1] = input_ids
                positions = serving(input_ids, positions, attention_mask)
            attention = KeptAttention(self.layout, cache, None, attention_mask, None)
            told = self.padding.arguments(input_ids, attention_mask) if attention_mask is not None else {}
            return gather_rows(self.run(input_ids, t, attention, **told), positions)
        last = cache.shape[3] - 2
        place = columns.clamp(max=last)
        if self.shifted:
            wanted = place.gather(1, positions)
            positions = positions + (serving(None, wanted, attention_mask) == wanted)  # its own state is one further on
            ids = kept_ids(cache)
            ids.scatter_(1, columns, input_ids.int())
            before = (place[:, :1] - 1).clamp(min=0)
            input_ids = torch.cat((ids.gather(1, before).to(input_ids.dtype), input_ids), dim=1)
            place = torch.cat((before, place), dim=1)
            columns = torch.cat((torch.full_like(before, last + 1), columns), dim=1)
        turn, arguments = None, dict[str, Tensor]()
        if self.rotary:
            turn = Turn(self.model.get_submodule(self.rotary), last + 1, self.layout.head_dim, place)
        elif attention_mask is not None and self.padding.first_position is not None:
            arguments["position_ids"] = self.padding.positions(None, attention_mask).gather(1, place)
        else:
            arguments["position_ids"] = place
        attention = KeptAttention(self.layout, cache, columns, attention_mask, turn)
        return gather_rows(self.run(input_ids, t, attention, **arguments), positions)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()


def output_weight(model: nn.Module) -> Tensor:
    layer = output_layer(model)
    if isinstance(layer, str):
        raise RuntimeError(f"{type(model).__name__} has another output layer than when it was adapted: {layer}")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def output_bias(model: nn.Module) -> Tensor:
    bias = getattr(output_layer(model), "bias", None)
    if not isinstance(bias, Tensor):
        raise RuntimeError(f"{type(model).__name__} has no bias in its output layer, as it had when it was adapted")
    return bias


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
