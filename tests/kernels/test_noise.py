"""Keyed noise: known answers, tails as good as float64's, and a function of the key alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from mdkern.kernels import noise

SEED = torch.tensor(20240601)


def words(*values: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = (torch.tensor(v) for v in values)
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    seed = key[0] | key[1] << 32
    seed -= (seed >> 63) << 64  # as int64
    got = noise.philox(torch.tensor(seed), words(*counter))
    assert tuple(int(word) for word in got) == answer


def tail_bits(draws: int) -> tuple[Tensor, Tensor]:
    """Random bits on condition that u < 2^-16, which is where noise above 11 comes from."""
    generator = torch.Generator().manual_seed(5)
    high = torch.randint(0, 1 << 16, (draws,), generator=generator)
    return high, torch.randint(0, 1 << 32, (draws,), generator=generator)


def noise_24_bits(high: Tensor, low: Tensor) -> Tensor:
    """What most samplers do: ``-log(-log(u))`` of a 24-bit u, given that it lies within 2^-16 of 1."""
    u = 1.0 - ((high >> 8) + 0.5) * 2.0**-24
    return -torch.log(-torch.log(u.float()))


def worst_tail_deviation(draw: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Largest deviation, in standard deviations, of the counts above 12, 14, 16, 17, 18 and 20."""
    draws = 1 << 20
    sample = draw(*tail_bits(draws)).double()
    worst = 0.0
    for level in (12.0, 14.0, 16.0, 17.0, 18.0, 20.0):
        probability = -torch.expm1(-torch.exp(torch.tensor(-level, dtype=torch.float64))).item() * 2**16
        deviation = (sample > level).sum().item() - draws * probability
        worst = max(worst, abs(deviation) / (draws * probability * (1 - probability)) ** 0.5)
    return worst


def test_tail_counts_are_those_of_a_gumbel() -> None:
    assert worst_tail_deviation(noise.gumbel_from_bits) < 4.5


def test_tail_counts_would_find_24_bit_noise() -> None:
    assert worst_tail_deviation(noise_24_bits) > 20.0


def test_noise_is_accurate_from_end_to_end() -> None:
    """Against float64 for u from 2^-65 to 1, both ends included."""
    high = torch.cat((torch.zeros(33, dtype=torch.int64), 2 ** torch.arange(32), 2**32 - 2 ** torch.arange(32)))
    low = torch.cat((torch.tensor([0]), 2 ** torch.arange(32), torch.full((64,), 12345)))
    u = (high.double() + (low.double() + 0.5) * 2.0**-32) * 2.0**-32
    exact = -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    got = noise.gumbel_from_bits(high, low).double()
    assert (got - exact).abs().max() < 4e-6  # noise up to 45: an ulp of float32 there
    assert got.max() > 44.0


def test_bulk_is_a_gumbel() -> None:
    index = torch.arange(200_000)
    zero = torch.zeros_like(index)
    sample = noise.gumbel(SEED, zero, zero, zero, index, noise.TOKEN)
    assert stats.kstest(sample.double().numpy(), "gumbel_r").pvalue > 1e-3


def test_a_draw_depends_on_its_key_alone() -> None:
    index = torch.arange(64)
    keys = torch.tensor([[3, 1, 4], [1, 5, 9]])
    together = noise.gumbel(SEED, keys[:, :1], keys[:, 1:2], keys[:, 2:], index, noise.GROUP)
    for row in range(2):
        for column in (0, 1, 37):
            alone = noise.gumbel(SEED, *keys[row], index[column], noise.GROUP)
            assert together[row, column] == alone


@pytest.mark.parametrize("change", ["seed", "sample", "position", "step", "index", "domain"])
def test_every_part_of_the_key_matters(change: str) -> None:
    parts = {"sample": 7, "position": 8, "step": 9, "index": 10}
    seed, domain = SEED, noise.TOKEN
    plain = noise.gumbel(seed, *(torch.tensor(v) for v in parts.values()), domain)
    if change == "seed":
        seed = seed + (1 << 40)
    elif change == "domain":
        domain = noise.POSITION
    else:
        parts[change] += 1
    assert noise.gumbel(seed, *(torch.tensor(v) for v in parts.values()), domain) != plain
