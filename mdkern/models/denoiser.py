"""What the sampler needs of a model: a backbone (ids -> hidden states) and a head (hidden rows -> vocabulary)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mdkern.kernels.head.reference import finish_logits

# What prepared denoisers keep from one call of `sample` to the next, by model: tensors in tuples, read by CUDA graphs.
PREPARED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def available_device(device: torch.device | str) -> torch.device:
    """`device`, refused if it is a GPU that is not there."""
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


def ids_of(name: str, value: Any, vocab_size: int, mask_id: int) -> tuple[int, ...]:
    """Ids as a tuple without repeats: of one id, of several, or of None.

    Raises:
        ValueError: what is no id of the vocabulary, or is the mask's.
    """
    ids = [item.item() if isinstance(item, Tensor) and item.ndim == 0 else item for item in listed(value)]
    for item in ids:
        whole = isinstance(item, Integral) and not isinstance(item, bool)
        if not whole or not 0 <= item < vocab_size or item == mask_id:
            allowed = f"0..{vocab_size - 1} other than the mask id {mask_id}"
            raise ValueError(f"{name} must be an id in {allowed}, or several, not {value!r}")
    return tuple(dict.fromkeys(map(int, ids)))


@dataclass(frozen=True)
class Head:
    """The output layer as data: ``logits = cap(scale * hidden @ weight.T) + bias``, ``cap(x) = c * tanh(x / c)``.

    The ids that may never be produced (the mask, padded ids) are those whose bias is ``-inf``: one mechanism for all
    of them, at the price of the addition that a bias costs anyway.
    """

    weight: Tensor | None  # [V, D] floating; None: the "hidden" rows are logits already
    bias: Tensor  # [V] float32
    scale: float = 1.0
    soft_cap: float = 0.0  # 0: none

    @property
    def padded_vocab_size(self) -> int:
        return self.bias.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits, float32 ``[..., V]``. For the baselines, tests and training; the sampler never calls it."""
        logits = hidden if self.weight is None else torch.nn.functional.linear(hidden, self.weight)
        return finish_logits(logits, self.bias, self.scale, self.soft_cap)


class Live:
    """An attribute that is made anew whenever it is read, unless one was assigned to the object."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else self.make(instance)


class Denoiser:
    """A masked diffusion language model, split where the sampler needs it split.

    Subclasses set the attributes and implement `hidden`; `mdkern.adapt` builds them from people's models.
    """

    name: str = "denoiser"
    vocab_size: int  # ids in 0..vocab_size-1, the mask id included if it lies there
    mask_id: int
    eos_ids: tuple[int, ...] = ()  # ids that end a text; the first fills what comes after
    max_length: int | None = None  # positions; None: no limit
    num_blocks: int | None = None  # B of the paper's equation (3)
    time_conditioning: bool = False
    takes_attention_mask: bool = True  # whether sequences may be padded
    right_padding_only: bool = False  # whether padding may come after the text only
    takes_cache: bool = False  # whether `cache_shape` and `window_hidden` are there
    no_cache_reason: str = ""  # why not, for messages
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
            positions: int64 ``[B, R]``: the positions of each sequence whose hidden states are wanted. Grouped by
                sequence because attention is: keys and values of a sequence are read once for all its rows.
            attention_mask: bool ``[B, L]``, False at padding; None: no padding anywhere.

        Returns:
            ``[B, L, D]`` or ``[B, R, D]``.
        """
        raise NotImplementedError

    def current(self) -> Denoiser:
        """The denoiser as its model is now, for one call of `sample`: itself, or a copy that holds it."""
        return self

    def description(self) -> str:
        """How it runs, for `repr`."""
        return "a Denoiser"

    def __repr__(self) -> str:
        facts = [f"{getattr(self, 'vocab_size', '?')} ids, mask id {getattr(self, 'mask_id', '?')}"]
        facts += [f"ends of text {', '.join(map(str, self.eos_ids))}"] if self.eos_ids else []
        facts += [f"at most {self.max_length} positions"] if self.max_length is not None else []
        facts += ["conditioned on the time"] if self.time_conditioning else []
        facts += [self.description()]
        without = f" because {self.no_cache_reason}" if self.no_cache_reason else ""
        facts += ["keeps keys and values" if self.takes_cache else f"keeps no keys and values{without}"]
        side = " after the text" if self.right_padding_only else ""
        facts += [f"takes padding{side}" if self.takes_attention_mask else "takes no padding"]
        return f"<{self.name}: {'; '.join(facts)}>"

    def prepared(self, rows: int) -> Denoiser:
        """The denoiser to run one call of `sample` by: itself, or one that shares its weights.

        It may keep what it computes here from the weights as they are now, which no one changes during the call: as an
        attribute, by which CUDA graphs recognise it, and in `PREPARED`, at the same addresses in the next call.

        Args:
            rows: positions of the largest pass, over all its sequences.
        """
        return self

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Shape of the tensor, of the denoiser's dtype, that keeps the keys and values of B sequences of L positions.

        Needed, as `window_hidden` is, of denoisers that say ``takes_cache``.
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
        """The head's input from a pass over some columns of each sequence, all others by their keys and values.

        The pass overwrites the window's own keys and values in `cache` and attends to all that it then holds. With
        all columns as the window nothing older is read: this is how a cache is filled. It runs inside CUDA graphs: no
        host reads, nothing kept but `cache`.

        Args:
            cache: of `cache_shape`, the same tensor at every call; zeros at first.
            input_ids: int64 ``[B, W]``, of the window.
            columns: int64 ``[B, W]`` in 0..L, where the window's ids are in their sequences; ascending. L: nowhere,
                to be left out of the cache. None: all of the L columns.
            positions: int64 ``[B, R]`` in 0..W-1, the window's entries whose hidden states are wanted.
            t, attention_mask: as in `hidden`, the mask ``[B, L]``.

        Returns:
            ``[B, R, D]``.
        """
        raise NotImplementedError

    def check_states(self, states: Any, batch: int, count: int) -> Tensor:
        """What `hidden` or `window_hidden` gave, refused if it is not ``[B, count, D]`` as the head needs it.

        Looks at what the host knows of a tensor, not at its values.
        """
        weight, bias = self.head.weight, self.head.bias
        wanted = batch, count, len(bias) if weight is None else weight.shape[1]
        if isinstance(states, Tensor) and tuple(states.shape) == wanted and states.device == bias.device:
            fits = states.is_floating_point() if weight is None else states.dtype == weight.dtype
            if fits:
                return states
        dtype = "a floating dtype" if weight is None else str(weight.dtype)
        given = type(states).__name__
        if isinstance(states, Tensor):
            given = f"{states.dtype} {tuple(states.shape)} on {states.device}"
        hint = ""
        if isinstance(states, Tensor) and states.ndim == 3 and states.shape[1] != count:
            hint = ": of each sequence the states at `positions` are wanted, in their order"
        raise ValueError(f"{self.name}.hidden gave {given}, expected {dtype} {wanted} on {bias.device}{hint}")

    def logits(self, input_ids: Tensor, t: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """float32 ``[B, L, V]`` with V the padded vocabulary: every logit of every position, as the baselines want."""
        return self.head.logits(self.hidden(input_ids, t, None, attention_mask))

    def flops(self, length: int, rows: int) -> int | None:
        """Floating-point operations of one forward pass of one sequence with `rows` head rows, None if unknown."""
        return None

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors to be checked for NaN before sampling starts."""
        if self.head.weight is not None:
            yield "head.weight", self.head.weight
