"""`Request`: the checked arguments of one call of `sample`, as the loops read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders import Decoder
from mdkern.kernels.head.arguments import Filters
from mdkern.models import Denoiser
from mdkern.routing import Router
from mdkern.schedule import Schedule

CACHES = "none", "prefix", "dual", "block"


@dataclass(frozen=True)
class Request:
    """One call of `sample` with all arguments checked and defaults filled in."""

    denoisers: dict[str, Denoiser]  # by their names in the schedule; only those that it uses
    schedule: Schedule
    edges: Tensor  # int64 [N, P + 1], the step of each sequence at which each of the schedule's P parts begins, and T
    decoder: Decoder
    steps: Tensor  # int64 [N], T of each sequence
    most_steps: int  # the largest T of the call
    block_length: int | None  # None: one block
    blocks: Tensor  # int64 [N], number of blocks of each sequence
    start: Tensor  # int64 [N], the column from which the blocks of each sequence are counted
    cache: str  # one of CACHES
    eos_ids: tuple[int, ...]  # ends of text of all the denoisers; the first fills everything after an end of text
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
    router: Router | None = None  # chooses the models instead of the schedule
    batch_invariant: bool = False  # whether the samples' bits must not depend on the rest of the batch
    record: bool = False  # whether log-probabilities are recorded as tokens are revealed

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
    """The request with some of its samples only."""
    mask = request.attention_mask
    return replace(
        request,
        input_ids=request.input_ids[rows],
        attention_mask=None if mask is None else mask[rows],
        sample_ids=request.sample_ids[rows],
        steps=request.steps[rows],
        blocks=request.blocks[rows],
        start=request.start[rows],
        edges=request.edges[rows],
    )
