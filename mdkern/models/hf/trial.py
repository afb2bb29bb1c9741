"""Passes over a few ids of any denoiser: which part of a text it sees, and how it takes padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdkern.models.denoiser import Denoiser
from mdkern.models.hf.adapted import Padding
from mdkern.models.hf.introspect import accepted_arguments, first_position, first_setting

SEQUENCES, LENGTH = 2, 10  # of the ids of a probe
SPAN = 32  # length of the probe that finds out which part of the text a model sees
ROUNDINGS = 8  # a change is counted if it is more than this many times the change by rounding
# Largest difference between two ways to compute the same states: its root mean square over that of the states.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class Trial:
    """Passes over a few ids of any denoiser."""

    def __init__(self, model: Any, vocab_size: int, longest: int, device: torch.device) -> None:
        self.vocab_size, self.longest, self.device = vocab_size, longest, device
        self.accepted, self.first_position = accepted_arguments(model), first_position(model)
        self.length, self.spare = min(LENGTH, longest), 3
        shape, generator = (2, SEQUENCES, self.length), torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, shape, generator=generator)
        pad = first_setting(model, "pad_token_id")  # RoBERTa counts no position for it
        ids = torch.where(ids == (-1 if pad is None else pad), (ids + 1) % vocab_size, ids)
        self.ids, self.other_ids = ids.to(device)
        self.t = torch.full((SEQUENCES,), 0.5, device=device)

    def direction(self, denoiser: Denoiser) -> str:
        """What a model does not see of a text, in words that follow its name; "" if it sees all.

        One pass runs four sequences: the original, one with another last id, one with another first id, and the
        original again, which shows what changes by rounding.
        """
        length = min(SPAN, self.longest)
        if length < 4 or self.vocab_size < 2:
            return ""
        ids = torch.randint(self.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
        rows = ids.repeat(4, 1)
        rows[1, -1], rows[2, 0] = (rows[1, -1] + 1) % self.vocab_size, (rows[2, 0] + 1) % self.vocab_size
        states = denoiser.hidden(rows.to(self.device), torch.full((4,), 0.5, device=self.device)).double()
        same, last, first, again = states.nan_to_num(posinf=0.0, neginf=0.0)
        rounding = ROUNDINGS * (same - again).abs().max()
        from_last, from_first = ((same - other).abs().amax(-1) > rounding for other in (last, first))
        left, right = int(from_last[:-1].sum()), int(from_first[1:].sum())  # number of positions that have changed
        if right < length - 1 or left > (length - 1) // 2:
            return ""
        if not left:
            return "looks to the left only"
        return "does not look beyond the block that a position is in"

    def padding(self, ways: list[str], denoiser: Callable[[Padding], Denoiser]) -> Padding:
        """How padding is passed to the model: the first of `ways` with which padded text gives what it gives alone."""
        places = [None, self.first_position] if "position_ids" in self.accepted else [None]
        one_sided = Padding()
        for way in ways:
            for place in places:
                padding = Padding(way, place)
                try:
                    sides = self.unseen_padding(denoiser(padding))
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # the model does not accept padding in this way
                    continue
                if sides == (True, True):
                    return padding
                if sides[0] and not one_sided.way:
                    one_sided = padding._replace(right_only=True)
        return one_sided

    def unseen_padding(self, denoiser: Denoiser) -> tuple[bool, bool]:
        """Whether text before padding, and text after it, gives what it gives alone, whatever ids the padding has.

        It must agree in all bits, or up to the change that the text of another sequence makes by rounding, as it does
        where tokens are sorted by experts.
        """
        text = max(1, self.length - self.spare)
        column = torch.arange(self.length, device=self.device)
        mask = torch.stack((column < text, column >= self.length - text))

        def states(texts: Tensor, padding: Tensor) -> Tensor:
            ids = padding.masked_scatter(mask, texts)
            hidden = denoiser.hidden(ids, self.t, None, mask)
            return hidden[mask].view(SEQUENCES, text, -1).nan_to_num(posinf=0.0, neginf=0.0)

        texts, others = self.ids[:, :text], self.other_ids[:, :text]
        first, second = states(texts, self.ids), states(texts, self.other_ids)
        alone = denoiser.hidden(texts, self.t).nan_to_num(posinf=0.0, neginf=0.0)
        rounding = torch.zeros(SEQUENCES, device=self.device, dtype=torch.float64)
        if not first.equal(second):
            company = (torch.stack((texts[0], others[1])), torch.stack((others[0], texts[1])))
            changed = torch.stack([states(both, self.ids)[row] for row, both in enumerate(company)])
            rounding = ROUNDINGS * (changed.double() - first.double()).abs().amax((1, 2))
        leaks = (first.double() - second.double()).abs().amax((1, 2)) > rounding
        right, left = (not bool(leaks[row]) and close(first[row], alone[row], denoiser.dtype) for row in (0, 1))
        return right, left


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype, part: float = 1.0) -> bool:
    """Whether two computations in `dtype` agree up to rounding; they don't if there is a NaN."""
    ours, theirs = ours.double(), theirs.double()
    bound = part * CLOSE.get(dtype, CLOSE[torch.float32])
    return bool((ours - theirs).square().mean().sqrt() <= bound * theirs.square().mean().sqrt())
