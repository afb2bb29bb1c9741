"""`adapt`: people's models as denoisers, split into backbone and head where that can be; others run by their logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdkern.models import dit_fused, dit_window
from mdkern.models.denoiser import Denoiser, Head, available_device, ids_of
from mdkern.models.dit import DiT, gather_rows
from mdkern.models.hf.introspect import accepted_arguments, end_of_text, first_setting, longest_input, output_layer
from mdkern.models.hf.probe import examine
from mdkern.models.hf.split import SplitDenoiser, serving


def adapt(
    model: Any,
    *,
    vocab_size: int | None = None,
    mask_id: int | None = None,
    eos_id: int | Sequence[int] | None = None,
    max_length: int | None = None,
    num_blocks: int | None = None,
    device: torch.device | str | None = None,
    shifted: bool | None = None,
    name: str | None = None,
) -> Denoiser:
    """Make a `Denoiser` of a model.

    A module with ``get_output_embeddings``, as those of Hugging Face, is split: its own forward runs up to its output
    layer, which mdkern runs at the wanted positions only. What it can do is tried here by a few passes of a few ids,
    once for a model. Where it can't be split it runs by its logits, and a warning says why.

    Args:
        model: a `DiT`; a Hugging Face masked language model; any callable from ids int64 ``[B, L]`` to logits
            ``[B, L, V]`` (it is also given ``t`` ``[B]`` or ``attention_mask`` ``[B, L]`` if it has parameters of
            those names); or a `Denoiser`, returned as it is.
        vocab_size: V. Needed for callables; taken from the model's config otherwise.
        mask_id: the mask token's id. Needed for callables, and for Hugging Face models whose config has none.
        eos_id: an id that ends a text, or several; taken from the model's config otherwise.
        max_length, num_blocks: as in `Denoiser`.
        device: where a callable wants its ids; taken from a module's parameters.
        shifted: whether the logits at a position are those of the next one, as of models that were autoregressive;
            then position i is served by i - 1, and by itself where nothing is before it. None: if the config's
            ``model_type`` is Dream's.
        name: what to call it in messages.

    Raises:
        TypeError: not a model.
        ValueError: a missing or impossible `vocab_size` or `mask_id`, one that contradicts the model's own, `shifted`
            for a DiT or a `Denoiser`, a model in training mode, a device that is not there.
    """
    if isinstance(model, Denoiser | DiT):
        known = model.config if isinstance(model, DiT) else model
        for argument, value in (("vocab_size", vocab_size), ("mask_id", mask_id)):
            if value is not None and value != getattr(known, argument):
                raise ValueError(f"{argument}={value} contradicts the model's own {getattr(known, argument)}")
        if shifted:
            raise ValueError(f"shifted must not be given for a {type(model).__name__}: its states are in their places")
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
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{argument} must be a whole number, not {value!r}")
    assert vocab_size is not None
    assert mask_id is not None
    check_ids(vocab_size, mask_id)
    eos_ids = ids_of("eos_id", eos_id, vocab_size, mask_id) or end_of_text(model, vocab_size, mask_id)
    max_length = max_length if max_length is not None else longest_input(model)
    anatomy = examine(model, vocab_size, max_length)
    described: dict[str, Any] = {
        "vocab_size": vocab_size,
        "mask_id": mask_id,
        "eos_ids": eos_ids,
        "max_length": max_length,
        "num_blocks": num_blocks if num_blocks is not None else first_setting(model, "num_hidden_layers", "n_layers"),
        "shifted": str(getattr(config, "model_type", "")).lower() == "dream" if shifted is None else shifted,
        "name": name or str(getattr(model, "__name__", type(model).__name__)),
    }
    if isinstance(anatomy, str):
        return LogitsDenoiser(model, device=device, reason=anatomy if isinstance(model, nn.Module) else "", **described)
    return SplitDenoiser(model, anatomy, **described)


def check_ids(vocab_size: int, mask_id: int) -> None:
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, not {vocab_size}")
    if not 0 <= mask_id <= vocab_size:
        raise ValueError(f"mask_id must lie in 0..{vocab_size} for logits of {vocab_size} columns, not {mask_id}")


class DiTDenoiser(Denoiser):
    """Our `DiT`, with the last block pruned to the wanted rows."""

    takes_cache = True
    folds: dit_fused.Folds | None = None

    def __init__(self, model: DiT, name: str | None = None) -> None:
        config = model.config
        self.model = model
        self.name = name or f"DiT-{config.num_blocks}"
        self.vocab_size, self.mask_id = config.vocab_size, config.mask_id
        self.eos_ids = ids_of("eos_id", config.eos_id, config.vocab_size, config.mask_id)
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
        return self.model.hidden(input_ids, t, positions, attention_mask, self.folds)

    def prepared(self, rows: int) -> DiTDenoiser:
        """With the norms folded into the weights, where that serves."""
        with torch.no_grad():
            folds = dit_fused.fold(self.model, rows)
        if folds is None:
            return self
        prepared = copy.copy(self)
        prepared.folds = folds
        return prepared

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        return dit_window.cache_shape(self.model.config, batch, length)

    def window_hidden(
        self,
        cache: Tensor,
        input_ids: Tensor,
        columns: Tensor | None,
        positions: Tensor,
        t: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return dit_window.window_hidden(self.model, cache, input_ids, columns, positions, t, attention_mask)

    def flops(self, length: int, rows: int) -> int:
        return self.model.flops(length, rows)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()


class LogitsDenoiser(Denoiser):
    """Any callable from ids to logits. Exact, but every forward pass computes the logits of every position."""

    no_cache_reason = "it runs by its logits"

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        vocab_size: int,
        mask_id: int,
        eos_ids: tuple[int, ...],
        max_length: int | None,
        num_blocks: int | None,
        device: torch.device | str | None,
        shifted: bool,
        name: str,
        reason: str,
    ) -> None:
        """`reason`: why it can't be split, for the warning; "" if nobody could expect it to be."""
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.model, self.name, self.shifted = model, name, shifted
        # A mask id one past the logits is as common as one inside: the vocabulary then has one id more than columns.
        self.vocab_size, self.mask_id = max(vocab_size, mask_id + 1), mask_id
        self.eos_ids, self.max_length, self.num_blocks = eos_ids, max_length, num_blocks
        layer = output_layer(model)
        rows = 0 if isinstance(layer, str) else len(cast(Tensor, layer.weight))
        self.columns = max(vocab_size, rows)  # of the logits: tables may be padded
        chosen = available_device(device or (parameter.device if parameter is not None else "cpu"))
        self.dtype = parameter.dtype if parameter is not None else torch.float32
        accepted = accepted_arguments(model)
        self.time_conditioning = "t" in accepted
        self.takes_attention_mask = "attention_mask" in accepted
        bias = torch.zeros(self.columns, dtype=torch.float32, device=chosen)
        self.device = bias.device  # with its index, so that it compares equal to those of other tensors there
        bias[vocab_size:] = -torch.inf
        if mask_id < vocab_size:
            bias[mask_id] = -torch.inf
        self.head = Head(None, bias)
        because = f" because {reason}" if reason else ""
        warnings.warn(
            f"{self.name} runs by its logits{because}: the output layer is computed at every position of every forward"
            " pass",
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
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        output = self.model(input_ids, **arguments)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        expected = (*input_ids.shape, self.columns)
        if not isinstance(logits, Tensor):
            raise ValueError(f"{self.name} gave a {type(output).__name__}, expected floating logits {expected}")
        if tuple(logits.shape) != expected or not logits.is_floating_point():
            raise ValueError(
                f"{self.name} gave {logits.dtype} {tuple(logits.shape)}, expected floating logits {expected}"
            )
        if self.shifted:
            positions = serving(input_ids, positions, attention_mask)
        return logits if positions is None else gather_rows(logits, positions)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.model, nn.Module):
            yield from self.model.named_parameters()
