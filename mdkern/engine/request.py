"""A call of `sample`, resolved: what the loops read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders import Decoder
from mdkern.kernels.head.arguments import Filters
from mdkern.models import Denoiser
from mdkern.schedule import Schedule

CACHES = "none", "prefix", "dual"


@dataclass(frozen=True)
class Request:
    """A call of `sample`, resolved: nothing left to check."""

    denoisers: dict[str, Denoiser]  # by the schedule's names, only those that it uses
    schedule: Schedule
    edges: Tensor  # int64 [N, P + 1], each sequence's steps at which the schedule's P parts begin, and its T
    decoder: Decoder
    steps: Tensor  # int64 [N], T of each sequence
    most_steps: int  # of all sequences of the call
    block_length: int | None  # None: one block
    blocks: Tensor  # int64 [N], of each sequence
    cache: str  # of CACHES
    eos_ids: tuple[int, ...]  # of all the denoisers; the first fills what comes after the end of text
    stop_at_eos: bool
    input_ids: Tensor  # int64 [N, L] on the denoisers' device
    attention_mask: Tensor | None  # bool [N, L]; None: no padding
    sample_ids: Tensor  # int64 [N]
    batch_size: int
    temperature: float
    filters: Filters
    guidance_scale: float
    logits_processor: Any  # callable, or None
    stopping_criteria: Any  # callable, or None
    streamer: Any
    seed: int

    @property
    def parts(self) -> list[str]:
        """The denoiser of each of the schedule's parts."""
        return [name for name, _ in self.schedule.parts]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def masked(self) -> Tensor:
        """bool ``[N, L]``: the positions where text is wanted."""
        masked = self.input_ids == self.mask_id
        return masked if self.attention_mask is None else masked & self.attention_mask

    @property
    def mask_id(self) -> int:
        return next(iter(self.denoisers.values())).mask_id


def rows_of(request: Request, rows: slice | Tensor) -> Request:
    """Some of a request's samples."""
    mask = request.attention_mask
    return replace(
        request,
        input_ids=request.input_ids[rows],
        attention_mask=None if mask is None else mask[rows],
        sample_ids=request.sample_ids[rows],
        steps=request.steps[rows],
        blocks=request.blocks[rows],
        edges=request.edges[rows],
    )
