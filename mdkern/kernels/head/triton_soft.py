"""The first half of `soft_embedding` in Triton: probabilities of some ids, from hidden rows, in the table's dtype.

The product that weighs the embeddings with them is cuBLAS's.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from mdkern.kernels.triton_common import IMPOSSIBLE, LOG2E, tile_logits


@triton.jit(do_not_specialize=["first_tile", "rows", "vocab", "part"])
def soft_weights_kernel(
    hidden,  # [N, D], or a descriptor of it
    weight,  # [V, D], or a descriptor of it
    bias,  # [V] or None
    logsumexp,  # [M]
    temperature,  # [M], or None: `uniform_temperature` everywhere
    uniform_temperature,
    weights,  # [splits, M, part]: 2^SHIFT times the probabilities of ids from ``first_tile * BN`` on, 0 past V
    first_tile,
    tiles,  # of ids
    rows,  # M
    vocab,
    part,  # a multiple of BN
    hidden_dim,
    hidden_stride,
    weight_stride,
    scale,
    soft_cap,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SHIFT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BM)  # row tiles of the same ids run side by side and share the weight's rows in the cache
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    row = row_tile * BM + tl.arange(0, BM)
    valid = row < rows
    index = tl.where(valid, row, 0).to(tl.int64)
    x = tile_logits(
        hidden, weight, bias, index, row_tile, first_tile + tile, vocab, hidden_dim, hidden_stride, weight_stride,
        scale, soft_cap, BM, BN, BK, EVEN_K, HIDDEN_TMA, WEIGHT_TMA, FROM_LOGITS, HAS_SCALE, HAS_CAP, PRECISION,
    )  # fmt: skip
    divisor = tl.zeros([BM], tl.float32) + uniform_temperature
    if temperature is not None:
        divisor = tl.load(temperature + row, mask=valid, other=1.0)
    slope = LOG2E / tl.where(divisor == 0.0, 1.0, divisor)
    total = tl.load(logsumexp + row, mask=valid, other=0.0)
    shift = total * LOG2E - SHIFT
    p = tl.exp2(x * slope[:, None] - shift[:, None])
    p = tl.where(x > IMPOSSIBLE, p, (total * 0.0)[:, None])  # NaN stays NaN
    column = tile * BN + tl.arange(0, BN)
    split, within = column // part, column % part
    at = weights + (split.to(tl.int64) * rows)[None, :] * part + row.to(tl.int64)[:, None] * part + within[None, :]
    tl.store(at, p.to(weights.dtype.element_ty), mask=valid[:, None])
