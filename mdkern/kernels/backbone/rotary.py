"""`rotary`: rotary position embedding (Su et al., 2104.09864), the two halves of a head paired, in place.

In place on the output of the projection that made the heads, so that attention reads it where it lies. Where a layer
sees nothing of a sequence but its ids, that projection is a table over the ids: `gathered_heads` reads and turns its
rows. The contract, and the operators in plain PyTorch; `triton_rotary` runs them on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.device import has_triton


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """`rotary` in plain PyTorch."""
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # [N, 1, head_dim / 2]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def plain_gathered_heads(
    embedding: Tensor, table: Tensor, row_index: Tensor, cos: Tensor, sin: Tensor, heads: int, length: int
) -> tuple[Tensor, Tensor]:
    """`gathered_heads` in plain PyTorch."""
    outside = (row_index < 0) | (row_index >= table.shape[0])
    x, product = (
        source[row_index.masked_fill(outside, 0)].masked_fill(outside[:, None], torch.nan)
        for source in (embedding, table)
    )
    turned = product.unflatten(1, (-1, 2 * cos.shape[1]))[:, :heads]
    plain_rotary(turned, cos, sin, default_positions(turned, length))
    return x, product


def default_positions(x: Tensor, length: int) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) % length


@torch.library.custom_op("mdkern::rotary", mutates_args=("x",))
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, length: int) -> None:
    plain_rotary(x, cos, sin, default_positions(x, length) if positions is None else positions)


@_rotary.register_kernel("cuda")
def _on_gpu(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, length: int) -> None:
    if not has_triton(x.device) or x.dtype == torch.float64:
        plain_rotary(x, cos, sin, default_positions(x, length) if positions is None else positions)
        return
    from mdkern.kernels.backbone import triton_rotary  # imports Triton, which is no business of a machine without a GPU

    triton_rotary.rotary(x, cos, sin, positions, length)


@_rotary.register_fake
def _fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, length: int) -> None:
    return None


@torch.library.custom_op("mdkern::gathered_heads", mutates_args=())
def _gathered_heads(
    embedding: Tensor, table: Tensor, row_index: Tensor, cos: Tensor, sin: Tensor, heads: int, length: int
) -> tuple[Tensor, Tensor]:
    return plain_gathered_heads(embedding, table, row_index, cos, sin, heads, length)


@_gathered_heads.register_kernel("cuda")
def _gathered_on_gpu(
    embedding: Tensor, table: Tensor, row_index: Tensor, cos: Tensor, sin: Tensor, heads: int, length: int
) -> tuple[Tensor, Tensor]:
    if not has_triton(table.device) or table.dtype == torch.float64:
        return plain_gathered_heads(embedding, table, row_index, cos, sin, heads, length)
    from mdkern.kernels.backbone import triton_rotary

    return triton_rotary.gathered_heads(embedding, table, row_index, cos, sin, heads, length)


@_gathered_heads.register_fake
def _gathered_fake(
    embedding: Tensor, table: Tensor, row_index: Tensor, cos: Tensor, sin: Tensor, heads: int, length: int
) -> tuple[Tensor, Tensor]:
    rows = row_index.shape[0]
    return embedding.new_empty(rows, embedding.shape[1]), table.new_empty(rows, table.shape[1])


def rotary(
    x: Tensor,  # [N, H, head_dim]
    cos: Tensor,  # [P, head_dim / 2]
    sin: Tensor,  # [P, head_dim / 2]
    *,
    positions: Tensor | None = None,  # [N]
    length: int = 0,
) -> None:
    """Turn each pair ``(x[n, h, i], x[n, h, i + head_dim / 2])`` by the angle of row n's position, in place.

    Args:
        x: floating ``[N, H, head_dim]``, each row's heads lying together, any row stride: queries and keys of
            one projection are 2H heads of a row of ``3 * H * head_dim``.
        cos, sin: float32 ``[P, head_dim / 2]``, of the angle of each position.
        positions: int64 or int32 ``[N]`` in 0..P-1. None: row n is at ``n % length``.
        length: without `positions`, at most P.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if x.ndim != 3 or x.shape[2] % 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating [N, H, head_dim] with an even head_dim, not {x.dtype} {list(x.shape)}")
    if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
        raise ValueError(f"the heads of a row must lie together, not at strides {x.stride()}")
    check_angles(x, x.shape[2] // 2, cos, sin)
    if positions is None:
        check_length(length, cos)
    elif positions.shape != x.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions must be int64 [{x.shape[0]}], not {positions.dtype} {list(positions.shape)}")
    _rotary(x, cos, sin, positions, length)


def gathered_heads(
    embedding: Tensor,  # [T, D]
    table: Tensor,  # [T, C]
    row_index: Tensor,  # [N]
    cos: Tensor,  # [P, head_dim / 2]
    sin: Tensor,  # [P, head_dim / 2]
    *,
    heads: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    """``embedding[row_index]`` and ``table[row_index]``, the first `heads` heads of the latter turned as by `rotary`.

    Row n is at position ``n % length``. An index that is not there gives rows of NaN.

    Args:
        embedding: floating ``[T, D]``, any row stride.
        table: of the same dtype, ``[T, C]``, whole heads, any row stride: for each id queries, keys and values.
        row_index: int32 or int64 ``[N]``.
        cos, sin: as for `rotary`.
        heads: how many are turned; the columns after them are left as they are.
        length: at most P.

    Returns:
        ``[N, D]`` and ``[N, C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if row_index.ndim != 1 or row_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"row_index must be int64 [N], not {row_index.dtype} {list(row_index.shape)}")
    for name, matrix in (("embedding", embedding), ("table", table)):
        if matrix.ndim != 2 or not matrix.is_floating_point() or matrix.stride(1) != 1:
            raise ValueError(f"{name} must be floating [T, columns], each row together, not {list(matrix.shape)}")
    if table.dtype != embedding.dtype or len(table) != len(embedding):
        raise ValueError(
            f"table must be {embedding.dtype} of {len(embedding)} rows, not {table.dtype} {list(table.shape)}"
        )
    check_angles(table, sin.shape[-1], cos, sin)
    check_heads(heads, table.shape[1], cos)
    check_length(length, cos)
    return _gathered_heads(embedding, table, row_index, cos, sin, heads, length)


def check_angles(x: Tensor, half: int, cos: Tensor, sin: Tensor) -> None:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 2 or table.shape[1] != half or table.dtype != wide or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous {wide} [P, {half}], not {table.dtype} {list(table.shape)}")


def check_heads(heads: int, columns: int, cos: Tensor) -> None:
    head_dim = 2 * cos.shape[1]
    if not head_dim or columns % head_dim or not 0 <= heads * head_dim <= columns:
        raise ValueError(f"{heads} heads of {head_dim} are not among {columns} columns of whole heads")


def check_length(length: int, cos: Tensor) -> None:
    if not 0 < length <= cos.shape[0]:
        raise ValueError(f"length must be in 1..{cos.shape[0]} where no positions are given, not {length}")
