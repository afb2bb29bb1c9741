"""Denoisers around another one that change its output layer alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from copy import copy
from typing import Any, Self

from torch import Tensor

from mdkern.models.denoiser import Denoiser, Live

OWN = {"name", "description", "device", "dtype", "head"}
FACTS = [name for name in Denoiser.__annotations__ if name not in OWN]  # what does not depend on the output layer


class AroundDenoiser(Denoiser):
    """A denoiser with another one's backbone. Subclasses have the `head`."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.model = getattr(inner, "model", inner)  # by which CUDA graphs know the model
        self.name = inner.name
        for fact in FACTS:
            setattr(self, fact, getattr(inner, fact))

    device = Live(lambda self: self.inner.device)
    dtype = Live(lambda self: self.inner.dtype)

    def mark(self) -> Hashable:
        """What a captured step assumes not to change, besides what it assumes of the inner denoiser."""
        raise NotImplementedError

    def around(self, inner: Denoiser) -> Self:
        """The same around another form of the denoiser."""
        now = copy(self)
        now.inner = inner
        return now

    def current(self) -> Self:
        return self.around(self.inner.current())

    def prepared(self, rows: int) -> Self:
        return self.around(self.inner.prepared(rows))

    def precision_of(self, rows: int) -> str | None:
        return self.inner.precision_of(rows)

    def softened(self, weight: Tensor) -> Self:
        return self.around(self.inner.softened(weight))

    def hidden(self, *arguments: Any, **options: Any) -> Tensor:
        return self.inner.hidden(*arguments, **options)

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        return self.inner.cache_shape(batch, length)

    def paired_hidden(self, *arguments: Any, **options: Any) -> Tensor:
        return self.inner.paired_hidden(*arguments, **options)

    def window_hidden(self, *arguments: Any, **options: Any) -> Tensor:
        return self.inner.window_hidden(*arguments, **options)

    def flops(self, length: int, rows: int) -> int | None:
        return self.inner.flops(length, rows)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.inner.named_weights()
