"""Where texts end. After the first end of text in the written part, everything is filled with end of text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class End(NamedTuple):
    """The first position of each text that is masked or holds an end of text."""

    column: Tensor  # int64 [B, 1], 0 if there is no such position
    found: Tensor  # bool [B, 1], whether there is one
    masked: Tensor  # bool [B, 1], whether it is masked, so that it is not known yet where the text ends
    token: Tensor  # int64 [B, 1], its id

    @property
    def known(self) -> Tensor:
        """bool ``[B]``: whether the text has an end and no mask before it."""
        return (self.found & ~self.masked)[:, 0]


def is_any(ids: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """bool, of the shape of `ids`: which of them are in `wanted`. CUDA graphs may capture it: it copies nothing."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for item in wanted:
        found = found | (ids == item)
    return found


def find_end(ids: Tensor, wanted: Tensor, mask_id: int, ends: tuple[int, ...]) -> End:
    """The end of each text.

    Args:
        ids: int64 ``[B, L]``.
        wanted: bool ``[B, L]``, the positions that the sampler writes; an end of text elsewhere does not count.
        ends: the ids that end a text.
    """
    last = wanted & ((ids == mask_id) | is_any(ids, ends))
    column = last.int().argmax(-1, keepdim=True)
    token = ids.gather(-1, column)
    return End(column, last.gather(-1, column), token == mask_id, token)


def fill_tail(ids: Tensor, wanted: Tensor, end: End, ended: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """The ids with the texts in ``ended [B]`` filled up with end of text after their end.

    A masked end becomes `eos_id`; an end of text that was written is repeated.

    Returns:
        The ids, int64 ``[B, L]``, and which of them were filled in, bool ``[B, L]``.
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    tail = wanted & end.found & ended[:, None] & (column >= end.column + ~end.masked)
    return torch.where(tail, torch.where(end.masked, eos_id, end.token), ids), tail
