"""Adapted models as denoisers: the base of all of them, and those that are run by their logits.

Any callable from ids to logits can be run by its logits. It is exact, but every pass computes those of all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head, available_device
from mdkern.models.dit import gather_rows
from mdkern.models.fingerprint import remembered
from mdkern.models.hf.introspect import accepted_arguments, check_evaluating, execution_device, output_layer


class Padding(NamedTuple):
    """How padding is passed to a model. It is a tuple so that graphs compare it."""

    way: str = ""  # "attention": attention is replaced; "bool", "int64": a mask of the call; "untried"; "": not at all
    first_position: int | None = None  # not None: position ids are passed, too, with this one at a text's first token
    right_only: bool = False  # whether padding before a text would change it

    def arguments(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """Arguments of the model's call for a mask, bool ``[B, L]``, False at padding; none without a mask."""
        if attention_mask is None:
            return {}
        told = {} if self.first_position is None else {"position_ids": self.positions(input_ids, attention_mask)}
        if self.way in ("bool", "int64"):
            told["attention_mask"] = attention_mask.long() if self.way == "int64" else attention_mask
        return told

    def positions(self, input_ids: Tensor | None, attention_mask: Tensor) -> Tensor:
        """int64 ``[B, L]``: position of each token in its text; padding before it has that of the first token.

        Where positions begin above 0, the padding id has the position before the first one, wherever it is (RoBERTa).
        """
        if not self.first_position:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        assert input_ids is not None
        pad_id = self.first_position - 1
        counted = (attention_mask & (input_ids != pad_id)).long()
        return counted.cumsum(-1) * counted + pad_id


class AdaptedDenoiser(Denoiser):
    """A model that is run by its own forward."""

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
        """`vocab_size`: number of columns of its logits that are ids. The other arguments are as in `adapt`."""
        self.model, self.name, self.shifted = model, name, shifted
        # The mask id may be one past the logits, which is common; the vocabulary then has one id more than columns.
        self.columns, self.vocab_size, self.mask_id = vocab_size, max(vocab_size, mask_id + 1), mask_id
        self.eos_ids, self.max_length, self.num_blocks = eos_ids, max_length, num_blocks
        self.time_conditioning = "t" in accepted_arguments(model)

    def tell_padding(self, padding: Padding) -> None:
        """Pass padding to the model in this way from now on."""
        self.padding = padding
        self.takes_attention_mask, self.right_padding_only = bool(padding.way), padding.right_only

    def suppress(self, bias: Tensor) -> Tensor:
        """``bias [V]`` of the output layer, set to ``-inf`` for ids that must never be drawn."""
        bias[self.columns :] = -torch.inf
        if self.mask_id < len(bias):
            bias[self.mask_id] = -torch.inf
        return bias

    def wanted(
        self, states: Tensor, input_ids: Tensor, positions: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """The states of ``states [B, L, D]`` that give the logits of `positions` (None: all), ``[B, R, D]``."""
        if self.shifted:
            positions = serving(input_ids, positions, attention_mask)
        return states if positions is None else gather_rows(states, positions)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        model = self.model
        if isinstance(model, nn.Module):
            yield from remembered(model, "weights", lambda: list(model.named_parameters()))


def serving(input_ids: Tensor | None, positions: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """The positions of the states that give the logits of `positions` (None: all) in a shifted model.

    It is the position before, or at the start of a text (with nothing or padding before it) the position itself, as in
    Dream's generation at position 0.
    """
    if positions is None:
        assert input_ids is not None
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    before = (positions - 1).clamp(min=0)
    return before if attention_mask is None else torch.where(attention_mask.gather(1, before), before, positions)


class LogitsDenoiser(AdaptedDenoiser):
    """A module or function, run as it is."""

    no_cache_reason = no_soft_reason = "it runs by its logits"

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        reason: str,
        padding: Padding,
        device: torch.device | str | None = None,
        **facts: Any,
    ) -> None:
        """
        Args:
            reason: why it can't be split; "" for functions, of which this is not expected.
            padding: how padding is passed to it.
            device: the device of a function's ids.
            facts: the arguments of `AdaptedDenoiser`.
        """
        super().__init__(model, **facts)
        self.description = "runs by its logits" + (f" because {reason}" if reason else "")
        self.tell_padding(padding)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.dtype = parameter.dtype if parameter is not None else torch.float32
        layer = output_layer(model)
        rows = 0 if isinstance(layer, str) else len(layer.weight)  # tables may be padded
        chosen = available_device(device or execution_device(model) or "cpu")
        self.head = Head(None, self.suppress(torch.zeros(max(self.columns, rows), device=chosen, dtype=torch.float32)))
        self.device = self.head.bias.device  # with its index, so that it compares equal to those of other tensors there

    def current(self) -> LogitsDenoiser:
        """The denoiser of the model as it is now, as it may be on another device."""
        check_evaluating(self.model)
        now = copy(self)
        bias = self.head.bias.to(execution_device(self.model) or self.device)
        now.device, now.head = bias.device, replace(self.head, bias=bias)
        return now

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits in place of hidden states: ``[B, L, V]`` or ``[B, R, V]``."""
        output = self.run(input_ids, {"t": t} if self.time_conditioning else {}, attention_mask)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        columns = len(self.head.bias)
        expected = (*input_ids.shape, columns)
        given, hint = f"a {type(output).__name__}", ""
        if isinstance(logits, Tensor):
            if tuple(logits.shape) == expected and logits.is_floating_point():
                return self.wanted(logits, input_ids, positions, attention_mask)
            given = f"{logits.dtype} {tuple(logits.shape)}"
            extra = logits.shape[-1] - columns if logits.ndim == 3 and logits.is_floating_point() else 0
            if extra > 0:
                hint = f": if its last {extra} columns are padding, leave them off (logits[..., :{columns}])"
        raise ValueError(f"{self.name} gave {given}, expected floating logits {expected}{hint}")

    def run(self, input_ids: Tensor, arguments: dict[str, Any], attention_mask: Tensor | None) -> Any:
        """The model's output. An untried mask is passed as bool or, if the model raises an error for that, as int64."""

        def call(padding: Padding) -> Any:
            return self.model(input_ids, **arguments, **padding.arguments(input_ids, attention_mask))

        if attention_mask is None or self.padding.way != "untried":
            return call(self.padding)
        try:
            output, way = call(Padding("bool")), "bool"
        except (TypeError, RuntimeError):  # such as the one that 1 - mask raises for bools
            output, way = call(Padding("int64")), "int64"
        self.padding = Padding(way)
        return output
