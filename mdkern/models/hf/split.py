"""Other people's models in two: the backbone by their own forward, the output layer by mdkern's kernels.

For Hugging Face models and code loaded with ``trust_remote_code`` (LLaDA, Nie et al., 2502.09992; Dream, Ye et al.,
2508.15487), without knowing their architecture: a pass under `HeadPass` gives the input of the output layer. What
else must be known of a model, its `Anatomy`, is found out in `probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head
from mdkern.models.dit import gather_rows
from mdkern.models.hf.intercept import ID_ROOM, HeadPass, KeptAttention, Layout, Turn, WholeAttention, kept_ids
from mdkern.models.hf.introspect import accepted_arguments, output_layer


@dataclass(frozen=True)
class Anatomy:
    """What was found out about a model."""

    scale: float
    soft_cap: float
    bias: Tensor | None  # the output layer's
    layout: Layout | None = None  # of kept keys and values; None: they can't be kept
    rotary: str = ""  # name of the module that turns queries and keys from 0 on; "": the call takes position_ids
    no_cache: str = "nobody has tried"  # why keys and values can't be kept
    padding: str = ""  # where padding is told: to "attention", to the call as "attention_mask", or nowhere


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
        self.shifted = shifted
        weight = output_weight(model)
        accepted = accepted_arguments(model)
        self.fixed = {"use_cache": False} if "use_cache" in accepted else {}  # arguments of every call
        self.time_conditioning = "t" in accepted
        self.layout, self.rotary, self.padding = anatomy.layout, anatomy.rotary, anatomy.padding
        self.takes_cache, self.no_cache_reason = anatomy.layout is not None, anatomy.no_cache
        self.takes_attention_mask = bool(anatomy.padding)
        self.device, self.dtype = weight.device, next(model.parameters()).dtype
        bias = torch.zeros(len(weight), dtype=torch.float32, device=self.device)
        if anatomy.bias is not None:
            bias += anatomy.scale * anatomy.bias.detach().float()
        bias[vocab_size:] = -torch.inf
        if mask_id < len(bias):
            bias[mask_id] = -torch.inf
        self.head = Head(weight.detach(), bias, anatomy.scale, anatomy.soft_cap)

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        attention, arguments = None, dict[str, Tensor]()
        if self.padding == "attention":
            attention = WholeAttention(attention_mask)
        elif attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        hidden = self.run(input_ids, t, attention, **arguments)
        if self.shifted:
            return gather_rows(hidden, serving(input_ids, positions, attention_mask))
        return hidden if positions is None else gather_rows(hidden, positions)

    def run(
        self, input_ids: Tensor, t: Tensor | None, attention: Callable[..., Tensor] | None, **arguments: Any
    ) -> Tensor:
        """The output layer's input, ``[B, W, D]``."""
        weight, known = output_weight(self.model), self.head.weight  # addresses alone are compared: no device is asked
        assert known is not None
        if weight.data_ptr() != known.data_ptr() or weight.dtype != known.dtype:
            raise RuntimeError(f"{self.name} has another output layer than when it was adapted: adapt it again")
        if self.time_conditioning:
            arguments["t"] = t
        with HeadPass(weight, attention) as run:
            self.model(input_ids, **self.fixed, **arguments)
        if run.hidden is None:
            raise RuntimeError(f"{self.name} did not run its output layer, which it did when it was adapted")
        return run.hidden.to(known.dtype)

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
            return gather_rows(self.run(input_ids, t, attention), positions)
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
