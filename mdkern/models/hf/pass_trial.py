"""Compares passes of mdkern's own code with those of a model's forward, and passes of windows with whole ones."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor, nn

from mdkern.kernels.compile_ahead import rehearse_once
from mdkern.models.hf.llama_parts import tensors_of
from mdkern.models.hf.split import SplitDenoiser
from mdkern.models.hf.trial import CLOSE, ROUNDINGS, SEQUENCES, Trial, close

LONG_PASS = 64  # length of the probe of mdkern's own passes
MOST_UNSTEADY = 0.9  # largest difference of passes that may be right, of a model that roundings change as much

Question = tuple[Tensor, Tensor | None, Tensor | None]


class PassTrial(Trial):
    """Two ways to run a model that is split."""

    def __init__(self, model: nn.Module, weight: Tensor, vocab_size: int, longest: int) -> None:
        """`weight`: the output layer's."""
        super().__init__(model, vocab_size, longest, weight.device)
        self.model, self.weight = model, weight

    def close(self, ours: Tensor, theirs: Tensor, part: float = 1.0) -> bool:
        dtypes = self.weight.dtype, next(self.model.parameters()).dtype, ours.dtype
        return close(ours, theirs, max(dtypes, key=lambda dtype: CLOSE.get(dtype, 0.0)), part)

    def questions(self, padded: bool) -> list[Question]:
        """Ids, positions and masks of passes: whole, at some positions, of `padded` texts, of a longer text."""
        column, ids = torch.arange(self.length, device=self.weight.device), self.ids
        some = torch.tensor([[1, 0, self.length - 1], [2, 2, 0]], device=column.device).clamp(max=self.length - 1)
        mask = torch.stack((column < self.length - 1, column > 0)) if padded else None
        long = ids.flatten().repeat(1, -(-LONG_PASS // ids.numel()))[:, : min(self.longest, LONG_PASS)]
        return [(ids, None, None), (ids, some, None), (ids, None, mask), (long, None, None)]

    def passes_agree(self, ours: SplitDenoiser, theirs: SplitDenoiser) -> bool:
        """Whether whole passes, some positions, padded texts and windows are as the model's forward has them."""
        questions, part = self.questions(theirs.padding.way == "attention"), self.unsteadiness(theirs)
        self.compile_ahead(ours, questions)
        for rows, positions, seen in questions:
            mine, its = (denoiser.hidden(rows, self.t, positions, seen) for denoiser in (ours, theirs))
            if not (self.close(mine, its, part) if seen is None else self.close(mine[seen], its[seen], part)):
                return False
        return self.windows_agree(ours, part)

    def compile_ahead(self, ours: SplitDenoiser, questions: list[Question]) -> None:
        """Compile the kernels of mdkern's own passes side by side, by the first and the last block.

        Experts are left out: their kernels compute where rows lie, which must not be looked up before they have run.
        """
        parts = ours.parts
        if parts is None or any(block.experts is not None for block in parts.blocks):
            return
        short = copy(ours)
        short.parts = parts._replace(blocks=(parts.blocks[0], parts.blocks[-1]))

        def passes() -> None:
            for rows, positions, seen in questions:
                short.hidden(rows, self.t, positions, seen)
            for _ in self.windows(short):
                pass

        sizes = tuple((tensor.shape, tensor.dtype) for tensor in tensors_of(short.parts))
        rehearse_once(("passes", ours.padding, ours.block_causal, parts.head_dim, sizes), passes, self.device)

    def unsteadiness(self, denoiser: SplitDenoiser) -> float:
        """By how many times `CLOSE` right passes of a mixture of experts may differ, as they round differently.

        A rounding can give a row to another expert. How far that goes is seen in its own passes, over inputs that
        are changed by one rounding, and over sequences alone and together.
        """
        if not any(name.endswith("experts") for name, _ in self.model.named_modules()):
            return 1.0
        dtype = next(self.model.parameters()).dtype
        together = denoiser.hidden(self.ids, self.t).double()
        alone = [denoiser.hidden(ids[None], t[None]) for ids, t in zip(self.ids, self.t)]
        others = [torch.cat(alone).double()]
        if denoiser.takes_soft:
            weight = torch.full_like(self.ids, 1.0 - torch.finfo(dtype).eps, dtype=torch.float32)
            others.append(denoiser.softened(weight).hidden(self.ids, self.t).double())
        change = max(float((other - together).norm() / together.norm()) for other in others)
        return max(1.0, min(ROUNDINGS * change, MOST_UNSTEADY) / CLOSE.get(dtype, CLOSE[torch.float32]))

    def windows_agree(self, denoiser: SplitDenoiser, part: float = 1.0) -> bool:
        """Whether each of the `windows` gives what full passes give."""
        for ours, ids, at in self.windows(denoiser):
            theirs, real = denoiser.hidden(ids, self.t, at.clamp(max=self.length - 1)), at < self.length
            if not self.close(ours[real], theirs[real], part):
                return False
        return True

    def windows(self, denoiser: SplitDenoiser) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Fill a cache, then run all and some columns with other ids: the states, all ids, and the states' columns.

        Of a block-causal model one block is run after the other, whatever the cache holds of later ones.
        """
        length, device = self.length, self.weight.device
        everything = torch.arange(length, device=device).expand(SEQUENCES, -1)
        some = torch.tensor([[1], [length - 2]], device=device) + torch.arange(length // 2 - 1, device=device)
        cache = torch.zeros(denoiser.cache_shape(SEQUENCES, length), dtype=denoiser.dtype, device=device)
        windows = [everything, some.clamp(max=length)]
        if denoiser.block_causal is not None:
            width = denoiser.block_causal
            windows = [(everything[:, :width] + first).clamp(max=length) for first in range(0, length, width)]
        for ids, columns in ((self.ids, None), *((self.other_ids, window) for window in windows)):
            at = everything if columns is None else columns
            inside = at.clamp(max=length - 1)
            rows = torch.arange(at.shape[1], device=device).expand(SEQUENCES, -1)
            yield denoiser.window_hidden(cache, ids.gather(1, inside), columns, rows, self.t), ids, at
