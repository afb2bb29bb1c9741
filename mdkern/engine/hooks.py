"""Hooks into the sampler: guidance, logits processors (see `processors`) and streamers."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.engine.processors import Processors, Rows
from mdkern.kernels import vocab_projection
from mdkern.kernels.head.reference import CHUNK_ELEMENTS
from mdkern.kernels.head.sharded import vocab_projection_sharded
from mdkern.kernels.head.vocab_projection import RowStatistics
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head
from mdkern.models.shard import Shard

SECONDS_BETWEEN_DRAFTS = 0.1


def guided_hidden(
    denoiser: Denoiser,
    scale: float,
    input_ids: Tensor,
    given: Tensor | None,
    t: Tensor | None,
    positions: Tensor | None,
    attention_mask: Tensor | None,
) -> Tensor:
    """`Denoiser.hidden` under classifier-free guidance (Ho and Salimans, 2207.12598; in LLaDA, 2502.09992).

    The guided logits are ``u + (scale + 1) (c - u)``, where c are the logits of the sequence and u those of the
    sequence with everything given masked as well. The head is linear and the two weights sum to 1, so the same
    combination of hidden states gives the guided logits, bias included. It takes one pass of twice the batch and one
    head.

    Args:
        scale: strength of the guidance; 0 is one plain pass.
        given: bool ``[B, L]``, the positions that are masked for u; not read at scale 0.
        input_ids, t, positions, attention_mask: as in `Denoiser.hidden`.
    """
    count = (input_ids if positions is None else positions).shape[1]
    if scale == 0.0:
        hidden = denoiser.hidden(input_ids, t, positions, attention_mask)
        return denoiser.check_states(hidden, len(input_ids), count)
    assert given is not None

    def twice(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat((x, x))

    both = torch.cat((input_ids, torch.where(given, denoiser.mask_id, input_ids)))
    hidden = denoiser.hidden(both, twice(t), twice(positions), twice(attention_mask))
    hidden = denoiser.check_states(hidden, len(both), count)
    conditional, unconditional = hidden.float().chunk(2)
    guided = torch.lerp(unconditional, conditional, scale + 1.0)
    if denoiser.head.weight is None:  # these are logits, and c - u is NaN where both are -inf
        guided = torch.where(conditional == unconditional, conditional, guided)
    return guided.to(hidden.dtype)


class Texts(NamedTuple):
    """What logits processors are given of the sequences of a pass."""

    input_ids: Tensor  # int64 [B, L], as they are now, masks included
    attended: Tensor | None  # bool [B, L], False at padding; None: no padding
    columns: Tensor | None  # int64 [B, R], columns of the hidden states; None: all
    mask_id: int


def processed(processors: Processors, head: Head, states: Tensor, rows: Rows) -> Tensor:
    """Logits ``[M, V]`` of hidden ``states [M, D]`` after the processors, with a column for the mask id in any case."""
    logits, suppressed = head.logits(states), head.bias == -torch.inf
    missing = max(0, rows.mask_id + 1 - logits.shape[1])
    logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    suppressed = torch.nn.functional.pad(suppressed, (0, missing), value=True)
    return processors(rows, logits, suppressed)


def row_statistics(
    processors: Processors | None,
    head: Head,
    hidden: Tensor,
    texts: Texts,
    row: Tensor,
    row_count: Tensor,
    temperature: Tensor,
    seed: Tensor,
    keys: Tensor,
    **options: Any,
) -> RowStatistics:
    """`vocab_projection` of hidden states or, if there are processors, of the logits that they return.

    Logits are computed for the wanted rows only, some at a time.

    Args:
        hidden: ``[B, R, D]``; `row` indexes its ``B * R`` rows.
        row, row_count, temperature, seed, keys, options: as in `vocab_projection`. With processors, `row_count` is
            read by the host, which synchronises.
    """
    flat, width = hidden.flatten(0, 1), hidden.shape[1]
    if processors is None:
        shaping: dict[str, Any] = {"row_count": row_count, "scale": head.scale, "soft_cap": head.soft_cap}
        shaping["weight_scale"] = head.weight_scale
        if head.shard is not None:
            return of_shard(head, head.shard, flat, row, temperature, seed, keys, **shaping, **options)
        return vocab_projection(flat, head.weight, head.bias, row, temperature, seed, keys, **shaping, **options)
    count = int(row_count)
    chunk = max(1, CHUNK_ELEMENTS // head.padded_vocab_size)
    nothing = vocab_projection(flat.float(), None, None, row[:0], temperature[:0], seed, keys[:0], **options)
    parts = [nothing]
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        sequence, entry = row[part] // width, row[part] % width
        asked = Rows(
            texts.input_ids[sequence],
            None if texts.attended is None else texts.attended[sequence],
            entry if texts.columns is None else texts.columns[sequence, entry],
            keys[part, 1],
            texts.mask_id,
        )
        logits = processed(processors, head, flat[row[part]], asked)
        places = torch.arange(len(logits), device=logits.device)
        parts.append(vocab_projection(logits, None, None, places, temperature[part], seed, keys[part], **options))

    def whole(values: tuple[Tensor | None, ...], unused: float) -> Tensor | None:
        if values[0] is None:
            return None
        joined = torch.cat([value for value in values if value is not None])
        return torch.nn.functional.pad(joined, (0, len(row) - count), value=unused)

    token, *statistics = zip(*parts)
    joined = whole(token, -1), *(whole(values, torch.nan) for values in statistics)
    return RowStatistics(*joined)  # type: ignore[arg-type]


def of_shard(
    head: Head,
    shard: Shard,
    hidden: Tensor,
    row: Tensor,
    temperature: Tensor,
    seed: Tensor,
    keys: Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_p_rule: str = "reach",
    **options: Any,
) -> RowStatistics:
    """`vocab_projection` of a head that is divided over processes, with filters that `resolve` has refused."""
    assert head.weight is not None
    assert (top_k, top_p, min_p) == (0, 1.0, 0.0)
    bias = head.bias[shard.first : shard.stop]
    return vocab_projection_sharded(
        hidden, head.weight, bias, row, temperature, seed, keys, first=shard.first, exchange=shard.gather, **options
    )


class Drafts:
    """Hands sequences to a streamer while they are being written and when they are finished.

    A streamer of transformers has ``put`` and ``end``: it is given each finished sequence in two parts, the prompt and
    the rest, then ``end`` is called. If it also has ``put_draft``, it is given all sequences, int64 ``[N, L]`` with
    their masks, now and then.
    """

    def __init__(self, streamer: Any, ids: Tensor, given: Tensor, attended: Tensor | None = None) -> None:
        """
        Args:
            ids: int64 ``[N, L]``, all sequences at the start.
            given: bool ``[N, L]``, the positions that are not masked then.
            attended: bool ``[N, L]``, False at padding, which is left out of finished sequences; None: no padding.
        """
        self.streamer, self.given, self.attended = streamer, given, attended
        self.put_draft = getattr(streamer, "put_draft", None)
        self.last = time.monotonic()
        self.draft = ids.cpu().clone() if self.put_draft else None
        self.stream = torch.cuda.Stream(ids.device) if ids.is_cuda and self.put_draft else None

    def begin(self, first: int, ids: Tensor) -> None:
        """From now on the sequences from number `first` on are written to `ids`, which later drafts read."""
        self.first, self.ids = first, ids

    def show(self) -> None:
        """Show a draft, unless one was shown just now. Reading it does not wait for steps that are still running."""
        if self.put_draft is None or time.monotonic() - self.last < SECONDS_BETWEEN_DRAFTS:
            return
        assert self.draft is not None
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            self.draft[self.first : self.first + len(self.ids)] = self.ids.cpu()
        self.put_draft(self.draft.clone())
        self.last = time.monotonic()

    def end(self, first: int, ids: Tensor, finished: Tensor) -> None:
        """Hand over the sequences ``ids [n, L]`` from number `first` on for which ``finished [n]`` is True."""
        if self.draft is not None:
            self.draft[first : first + len(ids)] = ids.cpu()
        if self.streamer is None:
            return
        rows = slice(first, first + len(ids))
        given = self.given[rows].cpu()
        attended = torch.ones_like(given) if self.attended is None else self.attended[rows].cpu()
        for row, known, text, whole in zip(ids.cpu(), given, attended, finished.tolist()):
            if not whole:
                continue
            sequence, known = row[text], known[text]
            prompt = int((~known).int().argmax())
            self.streamer.put(sequence[:prompt])
            self.streamer.put(sequence[prompt:])
            self.streamer.end()
