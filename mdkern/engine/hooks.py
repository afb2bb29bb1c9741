"""What others put into the sampler: guidance, logits processors (which: `processors`), streamers."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdkern.engine.processors import Processors, Rows
from mdkern.kernels import vocab_projection
from mdkern.kernels.head.reference import CHUNK_ELEMENTS
from mdkern.kernels.head.vocab_projection import RowStatistics
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head

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

    The logits are to be ``u + (scale + 1) (c - u)``, u those with what was given masked too. The head is linear and
    the two weights sum to 1, so the same combination of hidden states gives these logits, bias included: one pass of
    twice the batch, one head.

    Args:
        scale: 0: no guidance, one plain pass.
        given: bool ``[B, L]``, masked for u; not read at scale 0.
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
    if denoiser.head.weight is None:  # logits, with -inf in both where an id is impossible
        guided = torch.where(conditional == unconditional, conditional, guided)
    return guided.to(hidden.dtype)


class Texts(NamedTuple):
    """What logits processors may read of the sequences of a pass."""

    input_ids: Tensor  # int64 [B, L], as they are now, masks included
    attended: Tensor | None  # bool [B, L], False at padding; None: no padding
    columns: Tensor | None  # int64 [B, R], of the hidden states; None: all
    mask_id: int


def processed(processors: Processors, head: Head, states: Tensor, rows: Rows) -> Tensor:
    """Logits ``[M, V]`` of hidden ``states [M, D]``, as the processors leave them; the mask always has a column."""
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
    """`vocab_projection` of hidden states or, where there are processors, of logits that they have seen.

    The logits are computed for the rows alone, some at a time.

    Args:
        hidden: ``[B, R, D]``; `row` indexes its ``B * R`` rows.
        row, row_count, temperature, seed, keys, options: as in `vocab_projection`; with processors
            `row_count` is read, which synchronises.
    """
    flat, width = hidden.flatten(0, 1), hidden.shape[1]
    if processors is None:
        shaping: dict[str, Any] = {"row_count": row_count, "scale": head.scale, "soft_cap": head.soft_cap}
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


class Drafts:
    """Hands a streamer the sequences while they are being written, and when they are done.

    A streamer of transformers has ``put`` and ``end``: each finished sequence is put in two parts, what it began with
    and the rest, then ended. If it has ``put_draft`` it is given all sequences, int64 ``[N, L]`` with their masks, now
    and then.
    """

    def __init__(self, streamer: Any, ids: Tensor, given: Tensor, attended: Tensor | None = None) -> None:
        """`ids` and `given`, int64 and bool ``[N, L]``, are the start of all sequences.

        `attended`, bool ``[N, L]`` or None, says what is no padding: finished sequences are put without it.
        """
        self.streamer, self.given, self.attended = streamer, given, attended
        self.put_draft = getattr(streamer, "put_draft", None)
        self.last = time.monotonic()
        self.draft = ids.cpu().clone() if self.put_draft else None
        self.stream = torch.cuda.Stream(ids.device) if ids.is_cuda and self.put_draft else None

    def begin(self, first: int, ids: Tensor) -> None:
        """From now on sequences from number `first` on are being written: `ids` is read whenever a draft is shown."""
        self.first, self.ids = first, ids

    def show(self) -> None:
        """A draft, unless one was shown just now. Reading it does not wait for the steps that are under way."""
        if self.put_draft is None or time.monotonic() - self.last < SECONDS_BETWEEN_DRAFTS:
            return
        assert self.draft is not None
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            self.draft[self.first : self.first + len(self.ids)] = self.ids.cpu()
        self.put_draft(self.draft.clone())
        self.last = time.monotonic()

    def end(self, first: int, ids: Tensor, finished: Tensor) -> None:
        """Sequences from number `first` on are written, where ``finished [n]`` says so: ``ids [n, L]``."""
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
