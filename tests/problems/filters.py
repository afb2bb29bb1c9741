"""Rows of logits that are hard on filters, and what filtered draws from them must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from mdkern.kernels.head import reference
from mdkern.kernels.head.arguments import Filters, Head, Rows, Wanted
from tests.problems.projection import NAMES, SEED, exact_statistics, in_float8


def noise(generator: Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * 2


def integers(generator: Generator, rows: int, columns: int) -> Tensor:
    """Few different values, each many times."""
    return torch.randint(-4, 4, (rows, columns), generator=generator).float()


def flat(generator: Generator, rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns)


def suppressed(generator: Generator, rows: int, columns: int) -> Tensor:
    """Two ids in three impossible."""
    return noise(generator, rows, columns).masked_fill(torch.arange(columns) % 3 > 0, -torch.inf)


def penalised(generator: Generator, rows: int, columns: int) -> Tensor:
    """Suppressed as some do it, by large finite numbers."""
    penalty = torch.tensor([0.0, -1e4, -1e9])[torch.arange(columns) % 3]
    return noise(generator, rows, columns) + penalty


def peaked(generator: Generator, rows: int, columns: int) -> Tensor:
    """One token has nearly all."""
    logits = noise(generator, rows, columns)
    logits[:, columns // 3] = 25.0
    return logits


def two_peaks(generator: Generator, rows: int, columns: int) -> Tensor:
    """Equal maxima at both ends."""
    logits = noise(generator, rows, columns)
    logits[:, [0, columns - 1]] = 15.0
    return logits


def close(generator: Generator, rows: int, columns: int) -> Tensor:
    """Neighbouring floats, far from 0."""
    return 50.0 + torch.randint(0, 900, (rows, columns), generator=generator) * 2.0**-18


def minute(generator: Generator, rows: int, columns: int) -> Tensor:
    """Around 0, at every order of magnitude."""
    exponent = torch.rand(rows, columns, generator=generator) * 30
    return torch.randn(rows, columns, generator=generator).sign() * torch.exp(-exponent)


def zipf(generator: Generator, rows: int, columns: int) -> Tensor:
    logits = -1.2 * torch.arange(1, columns + 1).log() + torch.randn(rows, columns, generator=generator)
    return logits


ROWS: dict[str, Callable[[Generator, int, int], Tensor]] = {
    maker.__name__: maker
    for maker in (noise, integers, flat, suppressed, penalised, peaked, two_peaks, close, minute, zipf)
}

FILTERS = (
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (700, 1.0, 0.0),
    (100_000, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1e-6, 0.0),
    (0, 1.0, 0.1),
    (600, 0.95, 0.0),
    (40, 0.8, 0.02),
)


class FilterProblem:
    """Rows of one kind for `vocab_projection`; with `depth`, such that the hidden rows choose them from a basis."""

    def __init__(
        self,
        kind: str,
        rows: int = 12,
        columns: int = 777,
        depth: int = 0,
        dtype: torch.dtype = torch.float32,
        count: int | None = None,
        uniform: float | None = None,
        biased: bool = False,
        device: str = "cpu",
        seed: int = 0,
        float8: bool = False,
    ) -> None:
        generator = Generator().manual_seed(seed + rows * 31 + columns)
        self.rows, self.columns, self.count = rows, columns, count
        source = rows + 5
        if depth:
            self.hidden = torch.randn(source, depth, generator=generator).to(dtype)
            self.weight = (torch.randn(columns, depth, generator=generator) * 2 / depth**0.5).to(dtype).to(device)
        else:
            self.hidden, self.weight = ROWS[kind](generator, source, columns).to(dtype), None
        self.hidden, self.weight_scale = self.hidden.to(device), None
        if float8:
            self.weight, self.weight_scale = in_float8(self.weight)
        self.bias = None
        if biased:
            self.bias = torch.randn(columns, generator=generator).to(device)
            self.bias[::7] = -torch.inf
        self.row_index = torch.randperm(source, generator=generator)[:rows].to(device)
        number = torch.arange(rows)
        self.keys = torch.stack((number // 7 + 3, number % 7, number % 5 + 1), 1).to(device)
        self.seed = torch.tensor(SEED, device=device)
        self.uniform = uniform
        pattern = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.3]) if uniform is None else torch.tensor([uniform])
        self.temperatures = pattern.repeat(rows)[:rows].to(device)
        self.row_count = None if count is None else torch.tensor(count, device=device)

    def arguments(self, of: str = "model") -> tuple[Tensor, Head, Rows, Wanted]:
        """Of the implementations behind the operator, without the filters."""
        temperature = self.temperatures if self.uniform is None else None
        uniform = 1.0 if self.uniform is None else self.uniform
        rows = Rows(self.row_index, self.row_count, temperature, uniform, self.seed, self.keys)
        return self.hidden, Head(self.weight, self.bias, 1.0, 0.0, self.weight_scale), rows, Wanted(True, True, of)

    def logits(self) -> Tensor:
        rows = self.hidden[self.row_index].double()
        product = rows if self.weight is None else rows @ self.weight.double().T
        product = product if self.weight_scale is None else product * self.weight_scale.double()
        return product if self.bias is None else product + self.bias.double()


def check_filtered(
    problem: FilterProblem,
    got: tuple[Tensor, ...],
    filters: tuple[Any, ...],
    differing: int = 0,
    of: str = "model",
) -> None:
    """Tokens are the reference's (but for `differing` near-ties), and kept ones; statistics are float64's, or the
    reference's if they are the sampler's."""
    count = problem.rows if problem.count is None else problem.count
    token, statistics = got[0].cpu(), [value.cpu() for value in got[1:]]
    want = reference.vocab_projection(*problem.arguments(of), Filters(*filters))
    same = (token == want[0].cpu())[:count]
    assert int((~same).sum()) <= differing
    assert (token[count:] == -1).all()
    for value in statistics:
        assert value[count:].isnan().all()
    if not count:
        return
    logits = problem.logits()[:count].cpu()
    assert (excess(logits, problem.temperatures[:count].cpu(), token[:count], filters[:3]) < 1e-4).all()
    if of == "sampler":
        exact = [value.cpu()[:count].double() for value in want[1:]]
    else:
        exact = list(exact_statistics(logits, token[:count]))
    for name, value, truth in zip(NAMES, statistics, exact):
        torch.testing.assert_close(value[:count].double()[same], truth[same], rtol=2e-5, atol=2e-5, msg=name)


def excess(logits: Tensor, temperature: Tensor, token: Tensor, filters: tuple[int, float, float]) -> Tensor:
    """By how much each token fails the filters, from their definitions in float64: 0 or less of a kept one.

    Among equals the lower id comes first. What is more probable by less than rounding is not held against a token.
    """
    top_k, top_p, min_p = filters
    scaled = logits / temperature.double().masked_fill(temperature == 0, 1e-9)[:, None]
    own = scaled.gather(1, token[:, None])
    ids = torch.arange(logits.shape[1])
    before = (scaled > own + 1e-5) | ((scaled == own) & (ids < token[:, None]))
    over = torch.full((len(token),), -torch.inf, dtype=torch.float64)
    if 0 < top_k < logits.shape[1]:
        over = torch.maximum(over, before.sum(-1) - top_k + 1.0)
        kth = scaled.topk(top_k).values[:, -1:]
        first = (scaled > kth) | (
            (scaled == kth) & ((scaled == kth).cumsum(-1) <= top_k - (scaled > kth).sum(-1, True))
        )
        scaled = scaled.masked_fill(~first & (scaled < kth + 1e-5), -torch.inf)
    if top_p < 1.0:  # the probability of what comes before must be below top_p
        over = torch.maximum(over, (scaled.softmax(-1) * before).sum(-1) - top_p)
    if min_p > 0.0:
        over = torch.maximum(over, (scaled.amax(-1, keepdim=True) + math.log(min_p) - own)[:, 0])
    return over
