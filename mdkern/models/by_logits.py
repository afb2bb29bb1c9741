"""Any callable from ids to logits as a denoiser: exact, but every pass computes the logits of all positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Head, available_device
from mdkern.models.hf.adapted import AdaptedDenoiser, Padding
from mdkern.models.hf.introspect import check_evaluating, execution_device, output_layer


class LogitsDenoiser(AdaptedDenoiser):
    """A module or function, run as it is."""

    no_cache_reason = "it runs by its logits"

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
            reason: why it can't be split; "" if nobody could expect it to be.
            padding: how it is told of padding.
            device: where a function wants its ids.
            facts: the arguments of `AdaptedDenoiser`.
        """
        super().__init__(model, **facts)
        self.reason = reason
        self.tell_padding(padding)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.dtype = parameter.dtype if parameter is not None else torch.float32
        layer = output_layer(model)
        rows = 0 if isinstance(layer, str) else len(layer.weight)  # tables may be padded
        chosen = available_device(device or execution_device(model) or "cpu")
        self.head = Head(None, self.suppress(torch.zeros(max(self.columns, rows), device=chosen, dtype=torch.float32)))
        self.device = self.head.bias.device  # with its index, so that it compares equal to those of other tensors there

    def warn(self, stacklevel: int) -> None:
        """Warn that it is slower than it could be."""
        what = "the output layer is computed at every position of every forward pass"
        warnings.warn(f"{self.name} {self.description()}: {what}", stacklevel=stacklevel + 1)

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
        output = self.run(input_ids, {"t": t} if self.time_conditioning else {}, attention_mask)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        columns = len(self.head.bias)
        expected = (*input_ids.shape, columns)
        if not isinstance(logits, Tensor):
            raise ValueError(f"{self.name} gave a {type(output).__name__}, expected floating logits {expected}")
        if tuple(logits.shape) != expected or not logits.is_floating_point():
            extra, hint = logits.shape[-1] - columns if logits.ndim == 3 else 0, ""
            if extra > 0 and logits.is_floating_point():
                hint = f": if its last {extra} columns are padding, leave them off (logits[..., :{columns}])"
            given = f"{logits.dtype} {tuple(logits.shape)}"
            raise ValueError(f"{self.name} gave {given}, expected floating logits {expected}{hint}")
        return self.wanted(logits, input_ids, positions, attention_mask)

    def run(self, input_ids: Tensor, arguments: dict[str, Any], attention_mask: Tensor | None) -> Any:
        """The model's output. A mask that nobody has tried is bool or, if the model raises an error of that, int64."""

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
