"""Any callable from ids to logits as a denoiser: exact, but every pass computes the logits of every position."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head, available_device
from mdkern.models.dit import gather_rows
from mdkern.models.hf.introspect import accepted_arguments, check_evaluating, execution_device, output_layer
from mdkern.models.hf.split import Padding, serving


class LogitsDenoiser(Denoiser):
    """Somebody's module or function, run as it is."""

    no_cache_reason = "it runs by its logits"

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        vocab_size: int,
        mask_id: int,
        eos_ids: tuple[int, ...] = (),
        max_length: int | None = None,
        num_blocks: int | None = None,
        device: torch.device | str | None = None,
        shifted: bool = False,
        name: str,
        reason: str = "",
        padding: Padding | None = None,
    ) -> None:
        """
        Args:
            reason: why it can't be split; "" if nobody could expect it to be.
            padding: how it is told of padding; None: by the parameter ``attention_mask``, if it has one, as bool or,
                if it raises an error of that, as int64.
        """
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.model, self.name, self.shifted, self.reason = model, name, shifted, reason
        # A mask id one past the logits is as common as one inside: the vocabulary then has one id more than columns.
        self.vocab_size, self.mask_id = max(vocab_size, mask_id + 1), mask_id
        self.eos_ids, self.max_length, self.num_blocks = eos_ids, max_length, num_blocks
        layer = output_layer(model)
        rows = 0 if isinstance(layer, str) else len(cast(Tensor, layer.weight))
        self.columns = max(vocab_size, rows)  # of the logits: tables may be padded
        chosen = available_device(device or execution_device(model) or "cpu")
        self.dtype = parameter.dtype if parameter is not None else torch.float32
        accepted = accepted_arguments(model)
        self.time_conditioning = "t" in accepted
        self.untried = padding is None and "attention_mask" in accepted
        self.padding = Padding("bool") if self.untried else padding or Padding()
        self.takes_attention_mask, self.right_padding_only = bool(self.padding.way), self.padding.right_only
        bias = torch.zeros(self.columns, dtype=torch.float32, device=chosen)
        self.device = bias.device  # with its index, so that it compares equal to those of other tensors there
        bias[vocab_size:] = -torch.inf
        if mask_id < vocab_size:
            bias[mask_id] = -torch.inf
        self.head = Head(None, bias)

    def warn(self, stacklevel: int) -> None:
        """Say that it is slower than it could be."""
        because = f" because {self.reason}" if self.reason else ""
        warnings.warn(
            f"{self.name} runs by its logits{because}: the output layer is computed at every position of every forward"
            " pass",
            stacklevel=stacklevel + 1,
        )

    def current(self) -> LogitsDenoiser:
        """As the model is now, which may have moved."""
        check_evaluating(self.model)
        now = copy(self)
        bias = self.head.bias.to(execution_device(self.model) or self.device)
        now.device, now.head = bias.device, Head(None, bias)
        return now

    def description(self) -> str:
        return "runs by its logits" + (f" because {self.reason}" if self.reason else "")

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits in place of hidden states: ``[B, L, V]`` or ``[B, R, V]``."""
        arguments: dict[str, Any] = {"t": t} if self.time_conditioning else {}
        output = self.run(input_ids, arguments, attention_mask)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        expected = (*input_ids.shape, self.columns)
        if not isinstance(logits, Tensor):
            raise ValueError(f"{self.name} gave a {type(output).__name__}, expected floating logits {expected}")
        if tuple(logits.shape) != expected or not logits.is_floating_point():
            raise ValueError(
                f"{self.name} gave {logits.dtype} {tuple(logits.shape)}, expected floating logits {expected}"
                + self.advice(logits)
            )
        if self.shifted:
            positions = serving(input_ids, positions, attention_mask)
        return logits if positions is None else gather_rows(logits, positions)

    def run(self, input_ids: Tensor, arguments: dict[str, Any], attention_mask: Tensor | None) -> Any:
        if attention_mask is None:
            return self.model(input_ids, **arguments)
        if not self.untried:
            return self.model(input_ids, **arguments, **self.padding.arguments(input_ids, attention_mask))
        try:
            output = self.model(input_ids, **arguments, attention_mask=attention_mask)
        except (TypeError, RuntimeError):  # as 1 - mask raises of bools
            output = self.model(input_ids, **arguments, attention_mask=attention_mask.long())
            self.padding = Padding("int64")
        self.untried = False
        return output

    def advice(self, logits: Tensor) -> str:
        extra = logits.shape[-1] - self.columns
        if logits.ndim == 3 and extra > 0 and logits.is_floating_point():
            return f": if its last {extra} columns are padding, leave them off (logits[..., :{self.columns}])"
        return ""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.model, nn.Module):
            yield from self.model.named_parameters()
