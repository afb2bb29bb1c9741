"""Stopping criteria. Those of transformers are called as if the text were written from left to right.

``MaxLengthCriteria``, ``StopStringCriteria`` and ``EosTokenCriteria`` are given the known beginning of each text: the
tokens before the first mask, without padding. They are called once for every length that this beginning has reached
since the last call, and the text ends where they say. ``MaxTimeCriteria`` only reads the clock. ``ConfidenceCriteria``
needs the scores of autoregressive generation and is refused. Any other callable is given the ids ``[B, L]`` as they
are, masks and padding included, and None for the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdkern.engine.processors import flat, name_of, transformers_name
from mdkern.plan import positions_in_text

OF_KNOWN_TEXT = {"MaxLengthCriteria", "StopStringCriteria", "EosTokenCriteria"}
AS_THEY_ARE = {"MaxTimeCriteria"}


@dataclass
class Criteria:
    """The criteria of a call, and how much of each text those of transformers have seen."""

    of_known_text: list[Callable[..., Any]]
    others: list[Callable[..., Any]]
    seen: list[int] = field(default_factory=list)  # number of tokens seen, by sequence

    @staticmethod
    def of(hook: Any) -> Criteria | None:
        """The criteria of a callable, or of a list of them; None for none.

        Raises:
            TypeError: something else.
            ValueError: a criterion of transformers that cannot work here.
        """
        criteria = flat("stopping_criteria", hook)
        for criterion in criteria:
            name = transformers_name(criterion)
            if name is not None and name not in OF_KNOWN_TEXT | AS_THEY_ARE:
                raise ValueError(
                    f"stopping_criteria: {type(criterion).__name__} cannot be right here: it reads the scores of a loop"
                    " that writes from left to right"
                )
        known = [criterion for criterion in criteria if transformers_name(criterion) in OF_KNOWN_TEXT]
        return Criteria(known, [c for c in criteria if c not in known]) if criteria else None

    def begin(self, count: int) -> None:
        """Begin a run of `count` sequences."""
        self.seen = [0] * (count + 1)

    def stop(
        self, ids: Tensor, wanted: Tensor, attended: Tensor | None, mask_id: int, sequence: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which texts end, bool ``[B]``, and the ids ``[B, L]`` with everything after such an end masked again.

        Args:
            ids: int64 ``[B, L]``.
            wanted: bool ``[B, L]``, the positions that the sampler writes.
            attended: bool ``[B, L]``, False at padding.
            sequence: int64 ``[B]``, the sequences' numbers in the run.
            asked: bool ``[B]``, the sequences for which the criteria are called.
        """
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for criterion in self.others:
            given = criterion(ids.clone(), None)
            try:
                answer = torch.as_tensor(given, device=ids.device)
            except (TypeError, ValueError, RuntimeError):  # None, a text
                answer = None
            if answer is None or answer.shape not in ((), (len(ids),)):
                kind = type(given).__name__ if answer is None else list(answer.shape)
                raise ValueError(
                    f"{name_of(criterion)} must return one answer or one a sequence, {len(ids)}, not {kind}"
                )
            ended = ended | answer.bool()
        if not self.of_known_text:
            return ended, ids
        column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        order, place = column, column  # column of each token of the text, and place in the text of each column
        if attended is not None:
            order, place = (~attended).int().argsort(dim=-1, stable=True), positions_in_text(attended)
        text, ours = ids.gather(1, order), wanted.gather(1, order)
        unknown = ours & (text == mask_id)
        size = wanted.shape[1] if attended is None else attended.sum(-1)
        known = torch.where(unknown.any(-1), unknown.int().argmax(-1), size)
        numbers, begun, lengths = sequence.tolist(), ours.int().argmax(-1).tolist(), known.tolist()
        rows = [row for row, is_open in enumerate(asked.tolist()) if is_open]
        first = {row: max(self.seen[numbers[row]], begun[row]) for row in rows}
        for length in range(min(first.values(), default=0) + 1, max(lengths) + 1):
            now = [row for row in rows if first[row] < length <= lengths[row]]
            hit = [row for row, answer in zip(now, self.answers(text[now, :length])) if answer]
            ended[hit], known[hit] = True, length
            rows = [row for row in rows if row not in hit]
        for row in first:
            self.seen[numbers[row]] = max(self.seen[numbers[row]], lengths[row])
        past = (place >= known[:, None]) & wanted & ended[:, None]
        return ended, torch.where(past, mask_id, ids)

    def answers(self, text: Tensor) -> list[bool]:
        """For each text, int64 ``[n, length]``, whether it ends with its last token."""
        if not len(text):
            return []
        return torch.stack([criterion(text, None).bool().cpu() for criterion in self.of_known_text]).any(0).tolist()
