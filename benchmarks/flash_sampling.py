"""A plain fused Gumbel-max sampler in two kernels, after FlashSampling (2603.15854): a peer for the benchmark.

The product's tiles get a Gumbel draw per logit and leave their best (score, id); a second kernel takes the best tile.
One token per row and nothing else: no probability, no statistics. Its noise is the usual ``-log(-log(u))``.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tiles(
    hidden, weight, seed, scores, ids, rows, columns, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    h = hidden + row[:, None] * depth + inner[None, :]
    w = weight + column[None, :] * depth + inner[:, None]
    logits = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, depth, BK):
        left = tl.load(h, mask=row[:, None] < rows, other=0.0)
        logits = tl.dot(left, tl.load(w, mask=column[None, :] < columns, other=0.0), logits)
        h += BK
        w += BK
    uniform = tl.rand(seed, row[:, None] * columns + column[None, :])
    score = tl.where(column[None, :] < columns, logits - tl.log(-tl.log(uniform)), -float("inf"))
    best, place = tl.max(score, 1, return_indices=True)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(scores + at, best, mask=row < rows)
    tl.store(ids + at, tl.program_id(1) * BN + place, mask=row < rows)


@triton.jit
def _best(scores, ids, token, tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    place = tl.argmax(tl.load(scores + row * tiles + at, mask=at < tiles, other=-float("inf")), 0)
    tl.store(token + row, tl.load(ids + row * tiles + place))


def sample(hidden: Tensor, weight: Tensor, seed: int) -> Tensor:
    """A token per row of ``hidden [M, D]``, int64 ``[M]``; D a multiple of 64."""
    rows, depth = hidden.shape
    block_rows = 16 if rows <= 16 else 64 if rows <= 64 else 128
    tiles = triton.cdiv(weight.shape[0], 128)
    scores = torch.empty((rows, tiles), dtype=torch.float32, device=hidden.device)
    ids = torch.empty((rows, tiles), dtype=torch.int32, device=hidden.device)
    token = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    warps = 8 if block_rows == 128 else 4
    _tiles[(triton.cdiv(rows, block_rows), tiles)](
        hidden, weight, seed, scores, ids, rows, weight.shape[0], depth, BM=block_rows, BN=128, BK=64, num_warps=warps
    )
    _best[(rows,)](scores, ids, token, tiles, BLOCK=triton.next_power_of_2(tiles))
    return token
