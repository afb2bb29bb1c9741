"""The interface of models: a backbone (ids -> hidden states) and a head (rows of hidden states -> vocabulary)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mdkern.kernels.head.reference import finish_logits, product_float32
from mdkern.models.shard import Shard

# What prepared denoisers keep between calls of `sample`, by model: tuples of tensors, which CUDA graphs read.
PREPARED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
QUANTISED_HEADS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # likewise, of `mdkern.models.float8_head`
AnyDenoiser = TypeVar("AnyDenoiser", bound="Denoiser")


def available_device(device: torch.device | str) -> torch.device:
    """`device`, refused if it is a GPU that does not exist here."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known: {str(error).splitlines()[0]}") from error
    found = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= found:
        raise ValueError(f"device {chosen} was asked for, but the GPUs that PyTorch finds here are {found}")
    return chosen


def listed(value: Any) -> list[Any]:
    """The items of one id, of several in whatever holds them, or of None."""
    value = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def ids_of(name: str, value: Any, vocab_size: int, mask_id: int) -> tuple[int, ...]:
    """Ids as a tuple without repeats, from one id, several, or None.

    Raises:
        ValueError: an id that is not in the vocabulary, or is the mask's.
    """
    ids = [item.item() if isinstance(item, Tensor) and item.ndim == 0 else item for item in listed(value)]
    for item in ids:
        if not is_whole(item) or not 0 <= item < vocab_size or item == mask_id:
            allowed = f"0..{vocab_size - 1} other than the mask id {mask_id}"
            raise ValueError(f"{name} must be an id in {allowed}, or several, not {value!r}")
    return tuple(dict.fromkeys(map(int, ids)))


@dataclass(frozen=True)
class Head:
    """The output layer as data: ``logits = cap(scale * hidden @ weight.T) + bias``, ``cap(x) = c * tanh(x / c)``.

    Ids that must never be drawn (the mask, padded ids) have a bias of ``-inf``.
    """

    weight: Tensor | None  # [V, D] floating; None: the "hidden" rows are logits already
    bias: Tensor  # [V] float32, of the whole vocabulary
    scale: float = 1.0
    soft_cap: float = 0.0  # c; 0: no cap
    weight_scale: Tensor | None = None  # [V] float32, of a weight in float8_e4m3fn, whose rows it multiplies
    shard: Shard | None = None  # the process's part of the vocabulary, whose rows `weight` has; None: all of it

    @property
    def padded_vocab_size(self) -> int:
        return self.bias.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits, float32 ``[..., V]``. For baselines, tests and training; the sampler does not call it."""
        if self.weight is None:
            logits = hidden
        elif self.weight_scale is None:
            logits = torch.nn.functional.linear(hidden, self.weight)
        else:
            logits = product_float32(hidden.reshape(-1, hidden.shape[-1]), self.weight, self.weight_scale)
            logits = logits.view(*hidden.shape[:-1], -1)
        if self.shard is not None:
            logits = self.shard.joined(logits)
        return finish_logits(logits, self.bias, self.scale, self.soft_cap)


class Live:
    """An attribute that is computed whenever it is read, unless a value was assigned to it."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else self.make(instance)


def held(denoiser: AnyDenoiser) -> AnyDenoiser:
    """A copy of a denoiser whose live attributes keep the values that they have now."""
    now = copy(denoiser)
    for name in ("head", "device", "dtype"):
        setattr(now, name, getattr(type(now), name).make(now))
    return now


class Denoiser:
    """A masked diffusion language model, split into a backbone and a head.

    Subclasses set the attributes and implement `hidden`; `mdkern.adapt` makes them from models.
    """

    name: str = "denoiser"
    description: str = "a Denoiser"  # how its model is run, for `repr`
    vocab_size: int  # ids in 0..vocab_size-1, the mask id included if it lies there
    mask_id: int
    eos_ids: tuple[int, ...] = ()  # ids that end a text; the first fills what comes after
    max_length: int | None = None  # most positions of a sequence; None: no limit
    num_blocks: int | None = None  # number of transformer blocks, B in equation (3) of 2604.02340
    time_conditioning: bool = False
    precision: str | None = None  # "fp8" if its products are in 8 bits; None: in the dtype of its weights
    head_precision: str | None = None  # likewise of its output layer's weight
    block_causal: int | None = None  # B, if position i sees the columns below (i // B + 1) B only; None: it sees all
    marked: tuple[str, ...] = ()  # attributes of tensors whose addresses another attribute, a `Mark`, stands for
    keeps_nothing: bool = False  # whether its passes are mdkern's code alone, which keeps nothing from one to the next
    takes_attention_mask: bool = True  # whether sequences may be padded
    right_padding_only: bool = False  # whether padding may only come after the text
    takes_cache: bool = False  # whether `cache_shape` and `window_hidden` are implemented
    no_cache_reason: str = ""  # why they are not, for messages
    takes_soft: bool = False  # whether `softened` is implemented
    no_soft_reason: str = ""  # why it is not, for messages
    tokenizer: Any = None  # of the checkpoint that it was loaded from, see `mdkern.from_pretrained`; None: not known
    device: torch.device
    dtype: torch.dtype
    head: Head

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The head's input at every position, or only at `positions`.

        Args:
            input_ids: int64 ``[B, L]``, mask id where not yet revealed.
            t: float32 ``[B]``, diffusion time in (0, 1]; read only if ``time_conditioning``.
            positions: int64 ``[B, R]``: the positions of each sequence whose hidden states are wanted.
            attention_mask: bool ``[B, L]``, False at padding; None: no padding anywhere.

        Returns:
            ``[B, L, D]`` or ``[B, R, D]``.
        """
        raise NotImplementedError

    def paired_hidden(self, noisy_ids: Tensor, clean_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`hidden` of a noisy text whose every block sees the blocks of the clean text before it, ``[B, L, D]``.

        Of a block-causal model this gives the likelihood of all blocks. By default a pass for each block.

        Args:
            noisy_ids, clean_ids, attention_mask: as `input_ids` and `attention_mask` of `hidden`.
        """
        assert self.block_causal is not None
        parts = []
        for first in range(0, noisy_ids.shape[1], self.block_causal):
            block = slice(first, first + self.block_causal)
            ids = torch.cat((clean_ids[:, :first], noisy_ids[:, block]), 1)
            attended = None if attention_mask is None else attention_mask[:, : ids.shape[1]]
            parts.append(self.hidden(ids, attention_mask=attended)[:, block])
        return torch.cat(parts, 1)

    def current(self) -> Denoiser:
        """The denoiser with its model's present state, for one call of `sample`: itself, or a copy."""
        return self

    def __repr__(self) -> str:
        facts = [f"{getattr(self, 'vocab_size', '?')} ids, mask id {getattr(self, 'mask_id', '?')}"]
        facts += [f"ends of text {', '.join(map(str, self.eos_ids))}"] if self.eos_ids else []
        facts += [f"at most {self.max_length} positions"] if self.max_length is not None else []
        facts += ["conditioned on the time"] if self.time_conditioning else []
        facts += [f"sees blocks of {self.block_causal} up to a position's own"] if self.block_causal else []
        facts += [self.description]
        without = f" because {self.no_cache_reason}" if self.no_cache_reason else ""
        facts += ["keeps keys and values" if self.takes_cache else f"keeps no keys and values{without}"]
        side = " after the text" if self.right_padding_only else ""
        facts += [f"takes padding{side}" if self.takes_attention_mask else "takes no padding"]
        return f"<{self.name}: {'; '.join(facts)}>"

    def prepared(self, rows: int) -> Denoiser:
        """The denoiser for one call of `sample`: itself, or one that shares its weights.

        It may compute something from the weights here, as they do not change during the call. It keeps it as an
        attribute, by which CUDA graphs recognise it, and in `PREPARED`, so that the next call has it at the same
        addresses.

        Args:
            rows: number of positions of the largest pass, over all its sequences.
        """
        return self

    def precision_of(self, rows: int) -> str | None:
        """`precision` in a pass over so many positions, all its sequences together."""
        return self.precision

    def softened(self, weight: Tensor) -> Denoiser:
        """The denoiser for one pass whose inputs are mixtures of tokens and the mask, see `mdkern.models.soft`.

        Must be implemented if ``takes_soft`` is set, for `hidden` and, with ``takes_cache``, for `window_hidden`.

        Args:
            weight: float32 ``[B, R]``, the share in 0..1 of the token at each of the pass's `positions`; at all others
                it is 1. Positions that are named twice have one weight.
        """
        raise NotImplementedError

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Shape of the tensor, of the denoiser's dtype, for the keys and values of B sequences of L positions.

        Must be implemented, like `window_hidden`, if ``takes_cache`` is set.
        """
        raise NotImplementedError

    def window_hidden(
        self,
        cache: Tensor,
        input_ids: Tensor,
        columns: Tensor | None,
        positions: Tensor,
        t: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The head's input from a pass over a window of each sequence, with cached keys and values of the rest.

        The pass overwrites the window's keys and values in `cache` and attends to everything that the cache then holds.
        If the window is all columns, nothing older is read; this is how a cache is filled. Of a block-causal model a
        column sees the blocks up to its own. The pass runs inside CUDA graphs: it must not read data on the host, or
        keep anything besides `cache`.

        Args:
            cache: a tensor of `cache_shape`, the same one at every call; zeros at first.
            input_ids: int64 ``[B, W]``, the ids of the window.
            columns: int64 ``[B, W]`` in 0..L, ascending: the columns of the window's ids in their sequences; L stands
                for none, and is not to be cached. None: all L columns.
            positions: int64 ``[B, R]`` in 0..W-1, the entries of the window whose hidden states are wanted.
            t, attention_mask: as in `hidden`; the mask is ``[B, L]``.

        Returns:
            ``[B, R, D]``.
        """
        raise NotImplementedError

    def why_not_invariant(self, length: int, attention_mask: Tensor | None) -> str:
        """Why the bits of its passes may depend on the rest of the batch (`mdkern.kernels.invariant`); "" if not."""
        return "its forward is not mdkern's own, so its sums may depend on the number of rows"

    def check_states(self, states: Any, batch: int, count: int) -> Tensor:
        """The result of `hidden` or `window_hidden`, refused if it is not ``[B, count, D]`` as the head needs it.

        Only shape, dtype and device are checked, which needs no synchronisation.
        """
        weight, bias, scaled = self.head.weight, self.head.bias, self.head.weight_scale is not None
        wanted = batch, count, len(bias) if weight is None else weight.shape[1]
        if isinstance(states, Tensor) and tuple(states.shape) == wanted and states.device == bias.device:
            fits = states.is_floating_point() if scaled or weight is None else states.dtype == weight.dtype
            if fits:
                return states
        dtype = "a floating dtype" if scaled or weight is None else str(weight.dtype)
        given, hint = type(states).__name__, ""
        if isinstance(states, Tensor):
            given = f"{states.dtype} {tuple(states.shape)} on {states.device}"
            if states.ndim == 3 and states.shape[1] != count:
                hint = ": of each sequence the states at `positions` are wanted, in their order"
        raise ValueError(f"{self.name}.hidden gave {given}, expected {dtype} {wanted} on {bias.device}{hint}")

    def logits(self, input_ids: Tensor, t: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """float32 ``[B, L, V]`` with V the padded vocabulary: all logits of all positions, for baselines."""
        return self.head.logits(self.hidden(input_ids, t, None, attention_mask))

    def flops(self, length: int, rows: int) -> int | None:
        """Floating-point operations of a forward pass of one sequence with the head at `rows` rows; None if unknown."""
        return None

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights to be checked for NaN before sampling begins, with names for messages."""
        if self.head.weight is not None:
            yield "head.weight", self.head.weight
