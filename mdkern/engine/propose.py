"""What the decoder of a step is shown, and what is revealed where it says so: tokens drawn from the output layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mdkern.decoders.base import Proposal
from mdkern.engine.hooks import Texts, row_statistics
from mdkern.engine.progress import Settings
from mdkern.engine.slots import Slots, attended
from mdkern.engine.state import SamplerState
from mdkern.kernels.head.vocab_projection import RowStatistics
from mdkern.kernels.loop.compact import compact
from mdkern.models.denoiser import Head

# From the slots' hidden states ``[B, R, D]`` and where they are wanted, bool ``[B, R]``: what the decoder is shown, and
# what is revealed where it says so, of which the token and its probability are read.
Propose = Callable[[Head, Settings, SamplerState, Slots, Tensor, Tensor], tuple[Proposal, Proposal]]


def propose_drawn(
    head: Head, settings: Settings, state: SamplerState, slots: Slots, rows: Tensor, hidden: Tensor
) -> tuple[Proposal, Proposal]:
    """Drawn tokens and their statistics: what the decoder is shown is what is revealed."""
    _, place, statistics = project(head, settings, state, slots, rows, hidden)
    proposal = arranged(statistics, place, rows.shape)
    return proposal, proposal


def project(
    head: Head, settings: Settings, state: SamplerState, slots: Slots, rows: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, RowStatistics]:
    """The output layer of hidden states ``[B, R, D]``, run where ``rows [B, R]`` says.

    Returns:
        The flat rows, wanted ones first, int64 ``[B * R]``; the place of each, for `spread`; and their statistics.
    """
    decoder = settings.decoder
    row, row_count = compact(rows)
    statistics = row_statistics(
        settings.logits_processor,
        head,
        hidden,
        Texts(slots.ids, attended(state, slots), slots.column, settings.mask_id),
        row,
        row_count,
        state.temperature.expand(len(row)),
        state.seed,
        slots.view.keys.flatten(0, 1)[row],
        want_top=decoder.wants_top,
        want_entropy=decoder.wants_entropy,
        of=decoder.of,
        **settings.filters._asdict(),
    )
    # What is past `row_count` goes to a place of its own after all others.
    place = torch.where(torch.arange(len(row), device=row.device) < row_count, row, len(row))
    return row, place, statistics


def spread(values: Tensor, place: Tensor, shape: torch.Size, missing: float) -> Tensor:
    """Row statistics in their places, ``[B, R]``, and `missing` elsewhere."""
    spread_out = values.new_full((len(place) + 1,), missing)
    spread_out[place] = values
    return spread_out[:-1].view(shape)


def arranged(statistics: RowStatistics, place: Tensor, shape: torch.Size) -> Proposal:
    """Row statistics as the decoder is shown them."""

    def spread_if_wanted(values: Tensor | None) -> Tensor | None:
        return None if values is None else spread(values, place, shape, torch.nan)

    return Proposal(
        spread(statistics.token, place, shape, -1),
        spread(statistics.log_prob.exp(), place, shape, torch.nan),
        spread_if_wanted(statistics.top1),
        spread_if_wanted(statistics.top2),
        spread_if_wanted(statistics.entropy),
    )
