"""`mdkern.kernels.backbone.invariant_linear` in Triton: one tile shape, and the inner dimension from first to last."""

# mypy: ignore-errors
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # row tiles that take all columns before the next ones begin, so that the weight stays in the L2 cache


@triton.jit(do_not_specialize=["rows"])
def invariant_linear_kernel(
    x,  # [N, K]
    weight,  # [C, K]
    bias,  # [C] or None
    out,  # [N, C]
    rows,
    columns,
    depth,
    x_stride,
    weight_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    row = (first + within % height) * BM + tl.arange(0, BM)
    column = within // height * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    # Rows and columns past the end repeat the last one, which is not stored: loads without masks are faster.
    left = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride + inner[None, :]
    right = weight + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * weight_stride + inner[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, tl.cdiv(depth, BK)):
        if EVEN_K:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = inner < depth - k * BK
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BK
        right += BK
    if bias is not None:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


def tile_of(dtype: torch.dtype) -> dict[str, Any]:
    """The tile and how it is run. It may depend on the dtype, and never on the number of rows."""
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "PRECISION": "ieee", "num_warps": 4, "num_stages": 3}
    return {"BM": 128, "BN": 128, "BK": 64, "PRECISION": "ieee", "num_warps": 8, "num_stages": 3}


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tile: dict[str, Any] | None = None) -> Tensor:
    """`invariant_linear` of rows ``[N, K]`` on a GPU (or, on the CPU, in Triton's interpreter)."""
    rows, depth = x.shape
    columns = weight.shape[0]
    out = x.new_empty(rows, columns)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tile = tile or tile_of(x.dtype)
    invariant_linear_kernel[(triton.cdiv(rows, tile["BM"]) * triton.cdiv(columns, tile["BN"]),)](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        out,
        rows,
        columns,
        depth,
        depth if rows == 1 else x.stride(0),  # the stride of a single row may be anything, and is not used
        weight.stride(0),
        GROUP=GROUP,
        EVEN_K=depth % tile["BK"] == 0,
        **tile,
    )
    return out
