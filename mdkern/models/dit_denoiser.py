"""`DiTDenoiser`: mdkern's own network as the sampler runs it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from mdkern.kernels.backbone.linear import FEWEST_ROWS
from mdkern.kernels.compile_ahead import Postponed, when_compiled
from mdkern.models import dit_fp8, dit_fused, dit_window
from mdkern.models.block_causal import paired_hidden
from mdkern.models.denoiser import Denoiser, Head, Live, held, ids_of
from mdkern.models.dit import Block, DiT
from mdkern.models.hf.introspect import check_evaluating


class DiTDenoiser(Denoiser):
    """A `DiT` as a denoiser. Its last block runs only at the wanted rows."""

    description = "runs by mdkern's own passes"
    takes_cache = True
    takes_soft = True
    keeps_nothing = Live(lambda self: not self.changed_module())
    room: dit_fused.Folds | None = None
    filling: Postponed | None = None  # of the room
    marked = ("filling",)
    weight: Tensor | None = None  # of soft inputs

    def __init__(
        self,
        model: DiT,
        name: str | None = None,
        eos_id: int | Sequence[int] | None = None,
        max_length: int | None = None,
        precision: str | None = None,
    ) -> None:
        if dit_fused.is_hooked(model) or type(model).forward is not DiT.forward:
            raise ValueError(
                "the DiT has a hook or a forward of its own, which sampling would pass over: it runs the backbone and"
                " the head apart. Hook the modules inside it, or adapt a function of ids that calls the DiT"
            )
        if any(type(block) is not Block or dit_fused.is_hooked(block) for block in model.blocks):
            self.takes_cache, self.no_cache_reason = False, "its blocks are hooked or replaced as a whole"
        config = model.config
        self.model = model
        self.name = name or f"DiT-{config.num_blocks}"
        self.vocab_size, self.mask_id = config.vocab_size, config.mask_id
        eos_id = eos_id if eos_id is not None else config.eos_id
        self.eos_ids = ids_of("eos_id", eos_id, config.vocab_size, config.mask_id)
        self.max_length = config.max_length if max_length is None else max_length
        if self.max_length > config.max_length:
            raise ValueError(f"max_length must be at most {config.max_length}, the model's own, not {max_length}")
        self.num_blocks = config.num_blocks
        self.time_conditioning, self.block_causal = config.time_conditioning, config.block_causal
        self.precision = "fp8" if precision == "fp8" else None
        self.check_precision()

    def check_precision(self) -> None:
        """Refuse a precision that the model can't run in as it is now."""
        if self.precision is None:
            return
        changed = self.changed_module()
        reason = f"its module {changed} is not as mdkern made it" if changed else dit_fp8.why_not(self.model)
        if reason:
            raise ValueError(f"precision={self.precision!r} is not for {self.name}: {reason}")
        mebibytes = dit_fp8.extra_bytes(self.model) / 2**20
        self.description = (
            "runs by mdkern's own passes, with the products of its blocks in e4m3 (fp8; on a GPU in passes of"
            f" {FEWEST_ROWS:,} positions or more), whose weights take {mebibytes:.1f} MiB more"
        )

    head = Live(lambda self: Head(self.model.head_weight.detach(), self.model.suppressed_bias().detach()))
    device = Live(lambda self: self.model.embedding.device)
    dtype = Live(lambda self: self.model.embedding.dtype)

    def current(self) -> DiTDenoiser:
        for part in self.model.modules():
            if isinstance(part, nn.Dropout):  # of an adapter: a DiT has none, and may be in training mode
                check_evaluating(part)
        self.check_precision()
        return held(self)

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        folds = self.folds_for(input_ids.numel())
        with torch.no_grad() if folds is not None else nullcontext():
            return self.model.hidden(input_ids, t, positions, attention_mask, folds, self.weight)

    @property
    def folds(self) -> dit_fused.Folds | None:
        """What was computed from the weights for the present call of `sample`."""
        if self.filling is not None:
            self.filling.finish()
        return self.room

    def folds_for(self, rows: int) -> dit_fused.Folds | None:
        """What the passes of this denoiser use; made now in 8 bits if the denoiser is not prepared."""
        if self.precision is None or self.folds is not None:
            return self.folds
        self.check_precision()
        with torch.no_grad():
            return dit_fused.fold(self.model, rows, self.precision)

    def precision_of(self, rows: int) -> str | None:
        return self.precision if dit_fused.pays(rows, self.model.embedding) else None

    def softened(self, weight: Tensor) -> DiTDenoiser:
        now = copy.copy(self)
        now.weight = weight
        return now

    def paired_hidden(self, noisy_ids: Tensor, clean_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.precision is not None:
            return super().paired_hidden(noisy_ids, clean_ids, attention_mask)
        return paired_hidden(self.model, noisy_ids, clean_ids, attention_mask)

    def prepared(self, rows: int) -> DiTDenoiser:
        """A denoiser with the norms folded into the weights, if that makes it faster, and with these in 8 bits."""
        model, precision = self.model, self.precision
        with torch.no_grad():
            room = dit_fused.room_for(model, rows, precision)
        if room is None:
            return self
        prepared = copy.copy(self)
        prepared.room = room
        key = self.device, model.config, self.dtype, precision
        prepared.filling = when_compiled(key, torch.no_grad()(partial(dit_fused.fill, model, room)), self.device)
        return prepared

    def why_not_invariant(self, length: int, attention_mask: Tensor | None) -> str:
        changed = self.changed_module()
        return f"its module {changed} is not as mdkern made it" if changed else ""

    def changed_module(self) -> str:
        """The name of a module that is not as mdkern made it; "" if there is none."""
        changed = next((name for name, part in self.model.named_modules() if not dit_fused.is_plain(part)), None)
        return "" if changed is None else changed or "as a whole"

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
        folds = self.folds_for(input_ids.numel())
        with torch.no_grad() if folds is not None else nullcontext():
            return dit_window.window_hidden(
                self.model, cache, input_ids, columns, positions, t, attention_mask, self.weight, folds
            )

    def flops(self, length: int, rows: int) -> int:
        return self.model.flops(length, rows)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
