"""Splits models: the backbone runs by the model's own forward, the output layer by mdkern's kernels.

This is for Hugging Face models and code loaded with ``trust_remote_code`` (LLaDA, Nie et al., 2502.09992; Dream, Ye et
al., 2508.15487). Their architecture need not be known: a pass under `HeadPass` gives the input of the output layer.
What else must be known about a model, its `Anatomy`, is found out in `probe`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdkern.kernels.compile_ahead import is_rehearsing
from mdkern.models.block_causal import block_mask, window_mask, with_padding
from mdkern.models.denoiser import Head, Live, held
from mdkern.models.dit import gather_rows
from mdkern.models.fingerprint import Mark, describe, remembered
from mdkern.models.hf import llama_fused
from mdkern.models.hf.adapted import AdaptedDenoiser, Padding, serving
from mdkern.models.hf.intercept import (
    ID_ROOM,
    HeadPass,
    KeptAttention,
    Layout,
    SoftInputs,
    Turn,
    kept_ids,
    whole_attention,
)
from mdkern.models.hf.introspect import OutputLayer, check_evaluating, output_layer
from mdkern.models.hf.llama_fp8 import Fp8Block, copies_of, size_of_copies, why_not
from mdkern.models.hf.llama_parts import Parts, Plan, UnlikeLlamaError, resolve
from mdkern.models.soft import Soft

MOST_PLANS = 4  # of a model, whose parts are kept; denoisers with other settings have other plans


class Anatomy(NamedTuple):
    """What was found out about a model. It is a tuple so that graphs compare it."""

    reason: str = ""  # why it can't be split; the next four are then empty
    scale: float = 1.0
    soft_cap: float = 0.0
    bias: bool = False  # whether the output layer has a bias
    layout: Layout | None = None  # layout of a KV cache; None: it can't have one
    rotary: str = ""  # name of the module that rotates queries and keys from 0 on; "": the call takes position_ids
    no_cache: str = "nobody has tried"  # why it can't have a KV cache
    embedding: str = ""  # name of the parameter in which it looks up its ids, if these may be mixed with the mask
    no_soft: str = "nobody has tried"  # why they may not
    lean: bool = False  # whether it is called with use_cache=False
    direction: str = ""  # what it does not see of a text
    padding: Padding = Padding()
    plan: Plan | None = None  # of its parts, if its backbone runs by mdkern's own passes
    own_forward: str = "nobody has tried"  # why it does not
    blocks: int | None = None  # length of the blocks of its block-causal attention; None: it sees the whole text
    told_mask: bool = False  # whether its call must be given a mask [B, 1, W, W], though another one is used


class SplitDenoiser(AdaptedDenoiser):
    """A module whose forward is cut at its output layer."""

    model: nn.Module
    weight: Tensor | None = None  # of soft inputs
    parts_mark: Mark | None = None  # stands for the parts in what a graph assumes not to change
    marked = ("parts",)
    keeps_nothing = True  # but for the model's own forward, which is not rehearsed

    def __init__(self, model: nn.Module, anatomy: Anatomy, *, precision: str | None = None, **facts: Any) -> None:
        """
        Args:
            precision: "fp8": the products of mdkern's own passes are in e4m3 where they can be. None: as the weights.
            facts: the arguments of `AdaptedDenoiser`.
        """
        super().__init__(model, **facts)
        self.precision = precision
        self.settle(anatomy)

    def settle(self, anatomy: Anatomy) -> None:
        """Set how the model is run, by its anatomy."""
        self.anatomy = anatomy
        self.takes_cache, self.no_cache_reason = anatomy.layout is not None, anatomy.no_cache
        self.takes_soft, self.no_soft_reason = bool(anatomy.embedding), anatomy.no_soft
        self.block_causal = anatomy.blocks
        self.tell_padding(anatomy.padding)

    @Live
    def description(self) -> str:
        anatomy = self.anatomy
        own = "" if anatomy.own_forward == anatomy.no_cache else f" because {anatomy.own_forward}"
        backbone = f"its own forward{own}" if anatomy.plan is None else "mdkern's own passes"
        how = f"split at its output layer, with its backbone run by {backbone}"
        if self.precision is None:
            return how
        reason, parts = self.why_not_fp8(), self.parts
        if reason or parts is None:
            return f"{how}; not in fp8 any more, because {reason}"
        return f"{how} in fp8, with copies of its weights of {size_of_copies(parts) / 2**20:,.1f} MiB"

    def check_precision(self) -> None:
        """Refuse a precision that the model can't run in as it is now."""
        reason = "" if self.precision is None else self.why_not_fp8()
        if reason:
            raise ValueError(f"precision={self.precision!r} is not for {self.name}: {reason}")

    def why_not_fp8(self) -> str:
        """Why its products can't be in e4m3 as it is now; "" if they can."""
        if self.anatomy.plan is None:
            return self.anatomy.own_forward
        parts = self.parts
        return "its modules are not what they were" if parts is None else why_not(parts)

    @Live
    def copies(self) -> tuple[Fp8Block, ...] | None:
        """The blocks' layers in e4m3 as the weights are now; None: products are in the weights' own dtype."""
        return self.find_copies()

    def find_copies(self, thorough: bool = False) -> tuple[Fp8Block, ...] | None:
        """`copies`, with an argument of `copies_of`."""
        if self.precision is None:
            return None
        self.check_precision()
        parts = self.parts
        assert parts is not None
        return copies_of(self.model, parts, thorough)

    @Live
    def parts(self) -> Parts | None:
        """The weights of the backbone as they are now, for mdkern's own passes; None where its own forward must run."""
        return self.parts_and_mark()[0]

    def parts_and_mark(self) -> tuple[Parts | None, Mark | None]:
        """`parts`, and the mark of their addresses."""
        model, plan = self.model, self.anatomy.plan
        if plan is None:
            return None, None
        known: list[tuple[Plan, tuple[Parts | None, Mark | None]]] = remembered(model, "parts", list)
        for other, found in known.copy():
            if other is plan:
                return found
        try:
            parts = resolve(model, plan)
            found = parts, Mark(describe(parts))
        except UnlikeLlamaError:
            found = None, None
        known.append((plan, found))
        del known[:-MOST_PLANS]  # an old one's angles take memory
        return found

    device = Live(lambda self: layer_of(self.model).weight.device)
    dtype = Live(lambda self: next(self.model.parameters()).dtype)

    @Live
    def head(self) -> Head:
        """The output layer as it is now, with -inf in the bias for ids that must never be drawn."""
        (weight, own), anatomy = layer_of(self.model), self.anatomy
        bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        if anatomy.bias:
            if own is None:
                raise RuntimeError(f"{self.name} has no bias in its output layer, as it had when it was adapted")
            bias += anatomy.scale * own.detach().float()
        return Head(weight.detach(), self.suppress(bias), anatomy.scale, anatomy.soft_cap)

    def current(self) -> SplitDenoiser:
        """The denoiser of the model as it is now. If its modules or tensors have changed, it is examined again."""
        from mdkern.models.hf.probe import examine

        check_evaluating(self.model)
        anatomy = examine(self.model, self.columns, self.max_length, blocks=self.block_causal)
        if anatomy.reason:
            raise ValueError(f"{self.name} can't be split as when it was adapted: {anatomy.reason}. Adapt it again")
        if anatomy.direction and not self.anatomy.direction:
            raise ValueError(f"{self.name} {anatomy.direction}, unlike when it was adapted. Adapt it again")
        now = copy(self)
        now.settle(anatomy)
        now = held(now)
        now.parts, now.parts_mark = now.parts_and_mark()
        now.copies = now.find_copies(thorough=True)
        return now

    def softened(self, weight: Tensor) -> SplitDenoiser:
        now = copy(self)
        now.weight = weight
        return now

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if self.precision is not None and torch.is_grad_enabled():  # rounded weights have none
            with torch.no_grad():
                return self.hidden(input_ids, t, positions, attention_mask)
        mask = self.mask_of(input_ids, None, input_ids.shape[1], attention_mask)
        parts, soft = self.parts_for(input_ids.shape[1], attention_mask), self.soft_at(positions)
        if parts is not None:
            if self.shifted:
                positions = serving(input_ids, positions, attention_mask)
            places = self.places(attention_mask)
            return llama_fused.run(parts, input_ids, positions, places, mask, soft=soft, copies=self.copies)
        replaced = self.padding.way == "attention" or self.block_causal is not None
        attention = whole_attention(mask) if replaced else None
        hidden = self.run(input_ids, t, attention, soft, **self.padding.arguments(input_ids, attention_mask))
        return self.wanted(hidden, input_ids, positions, attention_mask)

    def soft_at(self, positions: Tensor | None) -> Soft | None:
        """What is soft of a pass, whose mixtures are at these positions."""
        return None if self.weight is None else Soft(self.mask_id, self.weight, positions)

    def parts_for(self, length: int, attention_mask: Tensor | None) -> Parts | None:
        """The weights, if mdkern's own passes can run sequences of this length now.

        Raises:
            ValueError: they can't, and the model's own forward has no products in `precision`.
        """
        plan = self.anatomy.plan
        ours = plan is not None and llama_fused.runs_now() and length <= len(plan.cos)
        masked = attention_mask is not None and self.padding.way != "attention"
        parts = self.parts if ours and not masked else None
        if parts is None and self.precision is not None:
            self.check_precision()
            assert plan is not None
            reason = f"it is over {length} positions, of which there are {len(plan.cos)}"
            if length <= len(plan.cos):
                reason = "torch.compile is at work" if not masked else "its padding needs the model's own forward"
            raise ValueError(f"precision={self.precision!r} is not for this pass of {self.name}: {reason}")
        return parts

    def why_not_invariant(self, length: int, attention_mask: Tensor | None) -> str:
        with torch.no_grad():
            own = self.parts_for(length, attention_mask) is None
            if not own and self.copies is not None:
                return "its products in fp8 run by kernels that may choose their sums by the number of rows"
        return super().why_not_invariant(length, attention_mask) if own else ""

    def places(self, attention_mask: Tensor | None) -> Tensor | None:
        """Rotary positions ``[B, L]`` in padded text; None: they are the columns."""
        if attention_mask is None or self.padding.first_position is None:
            return None
        return self.padding.positions(None, attention_mask)

    def mask_of(
        self, input_ids: Tensor, columns: Tensor | None, length: int, attention_mask: Tensor | None
    ) -> Tensor | None:
        """What columns ``[B, W]`` see of sequences of this length, broadcastable to ``[B, H, W, L]``; None: everything.

        `columns` may be None for all of them.
        """
        if self.block_causal is None:
            return with_padding(None, attention_mask)
        if columns is None:
            return with_padding(block_mask(length, self.block_causal, input_ids.device), attention_mask)
        return window_mask(columns, length, self.block_causal, attention_mask)

    def run(
        self,
        input_ids: Tensor,
        t: Tensor | None,
        attention: Callable[..., Tensor] | None,
        soft: Soft | None,
        **arguments: Any,
    ) -> Tensor:
        """The output layer's input, ``[B, W, D]``."""
        if is_rehearsing():
            raise RuntimeError("a model's own forward is not rehearsed, as it may keep what it computes")
        weight = layer_of(self.model).weight
        held = vars(self).get("head")  # the head of this call of `sample`; only addresses are compared
        if held is not None and (weight.data_ptr() != held.weight.data_ptr() or weight.dtype != held.weight.dtype):
            raise RuntimeError(f"{self.name} got another output layer while it was sampled from")
        if self.time_conditioning:
            arguments["t"] = t
        if self.anatomy.lean:
            arguments["use_cache"] = False
        inputs = None
        if soft is not None:
            inputs = SoftInputs(self.model.get_parameter(self.anatomy.embedding), soft)
        told = square_mask(input_ids) if self.anatomy.told_mask else None
        if told is not None:
            arguments["attention_mask"] = told
        with HeadPass(weight, attention, inputs, told) as run:
            self.model(input_ids, **arguments)
        if inputs is not None and inputs.calls != 1:
            raise RuntimeError(f"{self.name} looked up its ids {inputs.calls} times, once when it was adapted")
        if run.hidden is None:
            raise RuntimeError(f"{self.name} did not run its output layer, which it did when it was adapted")
        return run.hidden.to(weight.dtype)

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        assert self.anatomy.layout is not None
        return self.anatomy.layout.shape(batch, length, ID_ROOM if self.shifted else 0)

    def window_hidden(
        self,
        cache: Tensor,
        input_ids: Tensor,
        columns: Tensor | None,
        positions: Tensor,
        t: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `Denoiser.window_hidden`. For a shifted model, the columns of a window must be consecutive.

        The logits for such a window's first column come from the column before it. That column is run with the window
        and attends as the window does, but its cached keys and values are not changed. Its id is cached for this.
        """
        if self.precision is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.window_hidden(cache, input_ids, columns, positions, t, attention_mask)
        layout, rotary = self.anatomy.layout, self.anatomy.rotary
        assert layout is not None
        parts, kept, places = (
            self.parts_for(cache.shape[3] - 1, attention_mask),
            layout.heads_of(cache),
            self.places(attention_mask),
        )
        soft = self.soft_at(positions)
        if columns is None:
            if self.shifted:
                kept_ids(cache)[:, :-1] = input_ids
            mask = self.mask_of(input_ids, None, input_ids.shape[1], attention_mask)
            if parts is not None:
                if self.shifted:
                    positions = serving(input_ids, positions, attention_mask)
                return llama_fused.run(parts, input_ids, positions, places, mask, kept, soft=soft, copies=self.copies)
            attention = KeptAttention(layout, cache, None, mask, None)
            hidden = self.run(input_ids, t, attention, soft, **self.padding.arguments(input_ids, attention_mask))
            return self.wanted(hidden, input_ids, positions, attention_mask)
        last = cache.shape[3] - 2
        place = columns.clamp(max=last)
        if self.shifted:
            entries, wanted = positions, place.gather(1, positions)
            positions = positions + (serving(None, wanted, attention_mask) == wanted)  # its own state is the next one
            ids = kept_ids(cache)
            ids.scatter_(1, columns, input_ids.int())
            before = (place[:, :1] - 1).clamp(min=0)
            input_ids = torch.cat((ids.gather(1, before).to(input_ids.dtype), input_ids), dim=1)
            place = torch.cat((before, place), dim=1)
            columns = torch.cat((torch.full_like(before, last + 1), columns), dim=1)
            soft = None if soft is None else soft._replace(positions=entries + 1)
        index = place if places is None else places.gather(1, place)
        mask = self.mask_of(input_ids, place, last + 1, attention_mask)
        if parts is not None:
            return llama_fused.run(parts, input_ids, positions, index, mask, kept, columns, soft, self.copies)
        turn, arguments = None, dict[str, Tensor]()
        if rotary:
            turn = Turn(self.model.get_submodule(rotary), last + 1, layout.head_dim, place)
        else:
            arguments["position_ids"] = index
        attention = KeptAttention(layout, cache, columns, mask, turn)
        return gather_rows(self.run(input_ids, t, attention, soft, **arguments), positions)


def square_mask(input_ids: Tensor) -> Tensor:
    """A mask for calls that must be given one, bool ``[B, 1, W, W]``, that hides something but nothing of all rows."""
    batch, width = input_ids.shape
    return torch.ones(width, width, dtype=torch.bool, device=input_ids.device).tril().expand(batch, 1, width, width)


def layer_of(model: nn.Module) -> OutputLayer:
    layer = output_layer(model)
    if isinstance(layer, str):
        raise RuntimeError(f"{type(model).__name__} has another output layer than when it was adapted: {layer}")
    return layer
