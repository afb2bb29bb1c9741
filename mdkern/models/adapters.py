"""`adapt`: people's models as denoisers. Our DiT is split into backbone and head; others run by their logits."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Denoiser, Head
from mdkern.models.dit import DiT, gather_rows


def adapt(
    model: Any,
    *,
    vocab_size: int | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    max_length: int | None = None,
    num_blocks: int | None = None,
    device: torch.device | str | None = None,
    name: str | None = None,
) -> Denoiser:
    """Make a `Denoiser` of a model.

    Args:
        model: a `DiT`; a Hugging Face masked language model; any callable from ids int64 ``[B, L]`` to logits
            ``[B, L, V]`` (it is also given ``t`` ``[B]`` or ``attention_mask`` ``[B, L]`` if it has parameters of
            those names); or a `Denoiser`, returned as it is.
        vocab_size: V. Needed for callables; taken from the model's config otherwise.
        mask_id: the mask token's id. Needed for callables, and for Hugging Face models whose config has none.
        eos_id, max_length, num_blocks: as in `Denoiser`.
        device: where a callable wants its ids; taken from a module's parameters.
        name: what to call it in messages.

    Raises:
        TypeError: not a model.
        ValueError: a missing or impossible `vocab_size` or `mask_id`, a model in training mode.
    """
    if isinstance(model, Denoiser):
        return model
    if isinstance(model, nn.Module) and not isinstance(model, DiT) and model.training:
        raise ValueError("model is in training mode, so dropout would be on: call model.eval() first")
    if isinstance(model, DiT):
        return DiTDenoiser(model, name)
    if not callable(model):
        raise TypeError(f"model must be a DiT, a masked language model or a callable, not {type(model).__name__}")
    config = getattr(model, "config", None)
    vocab_size = vocab_size if vocab_size is not None else getattr(config, "vocab_size", None)
    mask_id = mask_id if mask_id is not None else getattr(config, "mask_token_id", None)
    for argument, value in (("vocab_size", vocab_size), ("mask_id", mask_id)):
        if value is None:
            raise ValueError(f"{argument} must be given: {type(model).__name__} does not tell it")
    assert vocab_size is not None
    assert mask_id is not None
    return LogitsDenoiser(
        model,
        vocab_size=vocab_size,
        mask_id=mask_id,
        eos_id=eos_id if eos_id is not None else getattr(config, "eos_token_id", None),
        max_length=max_length if max_length is not None else getattr(config, "max_position_embeddings", None),
        num_blocks=num_blocks if num_blocks is not None else getattr(config, "num_hidden_layers", None),
        device=device,
        name=name,
    )


class DiTDenoiser(Denoiser):
    """Our `DiT`, with the last block pruned to the wanted rows."""

    def __init__(self, model: DiT, name: str | None = None) -> None:
        config = model.config
        self.model = model
        self.name = name or f"DiT-{config.num_blocks}"
        self.vocab_size, self.mask_id, self.eos_id = config.vocab_size, config.mask_id, config.eos_id
        self.max_length, self.num_blocks = config.max_length, config.num_blocks
        self.time_conditioning = config.time_conditioning
        self.device, self.dtype = model.embedding.device, model.embedding.dtype
        self.head = Head(model.head_weight.detach(), model.suppressed_bias().detach())

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return self.model.hidden(input_ids, t, positions, attention_mask)

    def flops(self, length: int, rows: int) -> int:
        return self.model.flops(length, rows)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()


class LogitsDenoiser(Denoiser):
    """Any callable from ids to logits. Exact, but every forward pass computes the logits of every position."""

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        vocab_size: int,
        mask_id: int,
        eos_id: int | None = None,
        max_length: int | None = None,
        num_blocks: int | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        if vocab_size < 1 or not 0 <= mask_id <= vocab_size:
            raise ValueError(f"mask_id {mask_id} must lie in 0..{vocab_size} for a vocabulary of {vocab_size}")
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.model = model
        self.name = name or str(getattr(model, "__name__", type(model).__name__))
        # A mask id one past the logits is as common as one inside: the vocabulary then has one id more than columns.
        self.columns, self.vocab_size = vocab_size, max(vocab_size, mask_id + 1)
        self.mask_id, self.eos_id, self.max_length, self.num_blocks = mask_id, eos_id, max_length, num_blocks
        self.device = (
            torch.device(device) if device else parameter.device if parameter is not None else torch.device("cpu")
        )
        self.dtype = parameter.dtype if parameter is not None else torch.float32
        accepted = accepted_arguments(model)
        self.time_conditioning = "t" in accepted
        self.takes_mask = "attention_mask" in accepted
        bias = torch.zeros(vocab_size, dtype=torch.float32, device=self.device)
        if mask_id < vocab_size:
            bias[mask_id] = -torch.inf
        self.head = Head(None, bias)
        warnings.warn(
            f"{self.name} runs by its logits: the output layer is computed at every position of every forward pass",
            stacklevel=3,
        )

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits in place of hidden states: ``[B, L, V]`` or ``[B, R, V]``."""
        arguments: dict[str, Tensor | None] = {"t": t} if self.time_conditioning else {}
        if self.takes_mask and attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        elif attention_mask is not None:
            raise ValueError(
                f"{self.name} takes no attention_mask, so sequences of different lengths cannot share a batch"
            )
        output = self.model(input_ids, **arguments)
        logits = output if isinstance(output, Tensor) else output.logits
        expected = (*input_ids.shape, self.columns)
        if tuple(logits.shape) != expected or not logits.is_floating_point():
            raise ValueError(
                f"{self.name} gave {logits.dtype} {tuple(logits.shape)}, expected floating logits {expected}"
            )
        return logits if positions is None else gather_rows(logits, positions)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.model, nn.Module):
            yield from self.model.named_parameters()


def accepted_arguments(model: Callable[..., Any]) -> set[str]:
    """Names of the parameters that a model's call takes."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return set()
