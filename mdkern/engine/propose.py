"""Runs the output layer for a step: what the decoder is given, and the tokens to reveal where it says so."""

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

# From the slots' hidden states ``[B, R, D]`` and where they are wanted, bool ``[B, R]``: the proposal that the decoder
# is given, and the one whose tokens and probabilities are used where it reveals something.
Propose = Callable[[Head, Settings, SamplerState, Slots, Tensor, Tensor], tuple[Proposal, Proposal]]


def propose_drawn(
    head: Head, settings: Settings, state: SamplerState, slots: Slots, rows: Tensor, hidden: Tensor
) -> tuple[Proposal, Proposal]:
    """Draw tokens. The decoder is given the tokens that are revealed, with their statistics."""
    _, place, statistics = project(head, settings, state, slots, rows, hidden)
    proposal = arranged(statistics, place, rows.shape)
    return proposal, proposal


def project(
    head: Head, settings: Settings, state: SamplerState, slots: Slots, rows: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, RowStatistics]:
    """Run the output layer for hidden states ``[B, R, D]`` where ``rows [B, R]`` is True.

    Returns:
        The flat rows, wanted ones first, int64 ``[B * R]``; the place of each, for `spread`; and their statistics.
    """
    decoder, asking = settings.decoder, (settings.decoder, settings.router)
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
        want_top=any(part.wants_top for part in asking if part is not None),
        want_entropy=any(part.wants_entropy for part in asking if part is not None),
        of=decoder.of,
        **settings.filters._asdict(),
    )
    # Rows past `row_count` go to an extra place after all others.
    place = torch.where(torch.arange(len(row), device=row.device) < row_count, row, len(row))
    return row, place, statistics


def spread(values: Tensor, place: Tensor, shape: torch.Size, missing: float) -> Tensor:
    """Row statistics at their places, ``[B, R]``, and `missing` elsewhere."""
    spread_out = values.new_full((len(place) + 1,), missing)
    spread_out[place] = values
    return spread_out[:-1].view(shape)


def arranged(statistics: RowStatistics, place: Tensor, shape: torch.Size) -> Proposal:
    """Row statistics as the `Proposal` for a decoder."""

    def spread_if_wanted(values: Tensor | None) -> Tensor | None:
        return None if values is None else spread(values, place, shape, torch.nan)

    return Proposal(
        spread(statistics.token, place, shape, -1),
        spread(statistics.log_prob.exp(), place, shape, torch.nan),
        spread_if_wanted(statistics.top1),
        spread_if_wanted(statistics.top2),
        spread_if_wanted(statistics.entropy),
    )
