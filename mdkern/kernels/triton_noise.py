"""`mdkern.kernels.noise` inside Triton kernels: the same Philox words, the same Gumbel noise."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

GROUP = tl.constexpr(0)
TOKEN = tl.constexpr(1)
POSITION = tl.constexpr(3)
TRANSITION = tl.constexpr(4)
DOMAIN_SHIFT = tl.constexpr(28)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def random_words(seed, sample, position, step, pair, DOMAIN: tl.constexpr):
    """Philox 4x32-10: two words for index ``2 * pair`` and two for ``2 * pair + 1``. All but `seed` are uint32."""
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = pair.to(tl.uint32) | (DOMAIN << DOMAIN_SHIFT)
    c0, c1, c2 = sample + c3 * 0, position + c3 * 0, step + c3 * 0
    return tl.philox_impl(c0, c1, c2, c3, key0, key1)


@triton.jit
def inverse_exponential(high, low):
    """``1 / -log1p(-u)``: the largest ``weight * inverse_exponential`` has the index that Gumbel-max would choose."""
    u = high.to(tl.float32) * 2.0**-32 + (low.to(tl.float32) + 0.5) * 2.0**-64
    u = tl.minimum(u, 1.0 - 2.0**-24)
    rest = 1.0 - u
    # log1p(-u) = log(rest) * u / (1 - rest), where the division undoes the rounding of rest.
    whole = rest == 1.0
    return tl.where(whole, 1.0, 1.0 - rest) / tl.where(whole, u, -LN2 * tl.log2(rest) * u)


@triton.jit
def gumbel(high, low):
    """Standard Gumbel noise, float32: `mdkern.kernels.noise.gumbel_from_bits`."""
    return tl.log(inverse_exponential(high, low))
