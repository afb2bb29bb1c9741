"""`rotary`: rotary position embedding (Su et al., 2104.09864), in place, dimension i paired with i + head_dim / 2.

It works in place on the output of the projection to queries, keys and values, so that attention can read that output
directly. In the first layer, whose input depends on the ids alone, the projection can be a table over the ids;
`gathered_qkv` reads rows of such a table and rotates them. This file has the contracts and the references in plain
PyTorch; `triton_rotary` has the GPU kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.checks import check_rows_apart, check_tensor
from mdkern.kernels.operator import operator


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, length: int) -> None:
    """`rotary` in plain PyTorch."""
    place = torch.arange(x.shape[0], device=x.device) % length if positions is None else positions.long()
    outside = (place < 0) | (place >= cos.shape[0])
    place = place.masked_fill(outside, 0)
    # [N, 1, head_dim / 2], NaN for positions outside the tables
    cos, sin = (table[place].masked_fill(outside[:, None], torch.nan)[:, None] for table in (cos, sin))
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def gathered_qkv_reference(
    embedding: Tensor, table: Tensor, row_index: Tensor, cos: Tensor, sin: Tensor, heads: int, length: int
) -> tuple[Tensor, Tensor]:
    """`gathered_qkv` in plain PyTorch."""
    outside = (row_index < 0) | (row_index >= table.shape[0])
    x, qkv = (
        source[row_index.masked_fill(outside, 0)].masked_fill(outside[:, None], torch.nan)
        for source in (embedding, table)
    )
    rotary_reference(qkv.unflatten(1, (-1, 2 * cos.shape[1]))[:, :heads], cos, sin, None, length)
    return x, qkv


def gathered_qkv_outputs(embedding: Tensor, table: Tensor, row_index: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = row_index.shape[0]
    return embedding.new_empty(rows, embedding.shape[1]), table.new_empty(rows, table.shape[1])


KERNELS = "mdkern.kernels.backbone.triton_rotary"
rotary_operator = operator(rotary_reference, lambda *_: None, f"{KERNELS}:rotary", mutates=("x",), name="rotary")
gathered_qkv_operator = operator(
    gathered_qkv_reference, gathered_qkv_outputs, f"{KERNELS}:gathered_qkv", name="gathered_qkv"
)


def rotary(
    x: Tensor,  # [N, H, head_dim]
    cos: Tensor,  # [P, head_dim / 2]
    sin: Tensor,  # [P, head_dim / 2]
    *,
    positions: Tensor | None = None,  # [N]
    length: int = 0,
) -> None:
    """Rotate each pair ``(x[n, h, i], x[n, h, i + head_dim / 2])`` by the angle of row n's position, in place.

    Args:
        x: floating ``[N, H, head_dim]``, contiguous within a row, any row stride. Queries and keys of one projection
            are the first 2H heads of rows of ``3 * H * head_dim``.
        cos, sin: float32 ``[P, head_dim / 2]``, of the angles of each position.
        positions: int64 or int32 ``[N]`` in 0..P-1; others give NaN. None: row n is at position ``n % length``.
        length: needed without `positions`; at most P.

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
    check_tensor("positions", positions, x.shape[:1], (torch.int64, torch.int32), x.device)
    check_rows_apart("x", x)
    rotary_operator(x, cos, sin, positions, length)


def gathered_qkv(
    embedding: Tensor,  # [T, D]
    table: Tensor,  # [T, C]
    row_index: Tensor,  # [N]
    cos: Tensor,  # [P, head_dim / 2]
    sin: Tensor,  # [P, head_dim / 2]
    *,
    heads: int,
    length: int,
) -> tuple[Tensor, Tensor]:
    """``embedding[row_index]``, and ``table[row_index]`` with its first `heads` heads rotated as by `rotary`.

    Row n is at position ``n % length``. An index outside 0..T-1 gives rows of NaN.

    Args:
        embedding: floating ``[T, D]``, any row stride.
        table: of the same dtype, ``[T, C]``, whole heads, any row stride: queries, keys and values of each id.
        row_index: int32 or int64 ``[N]``.
        cos, sin: as for `rotary`.
        heads: number of heads to rotate; the columns after them are copied.
        length: positions of a sequence, at most P.

    Returns:
        ``[N, D]`` and ``[N, C]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_tensor("row_index", row_index, (row_index.numel(),), (torch.int64, torch.int32), embedding.device)
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
    x, qkv = gathered_qkv_operator(embedding, table, row_index, cos, sin, heads, length)
    return x, qkv


def check_angles(x: Tensor, half: int, cos: Tensor, sin: Tensor) -> None:
    check_tensor("x", x, x.shape, x.dtype, x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (cos.shape[0] if cos.ndim else 0, half), wide, x.device)
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {table.stride()}")


def check_heads(heads: int, columns: int, cos: Tensor) -> None:
    head_dim = 2 * cos.shape[1]
    if not head_dim or columns % head_dim or not 0 <= heads * head_dim <= columns:
        raise ValueError(f"{heads} heads of {head_dim} are not among {columns} columns of whole heads")


def check_length(length: int, cos: Tensor) -> None:
    if not 0 < length <= cos.shape[0]:
        raise ValueError(f"length must be in 1..{cos.shape[0]} where no positions are given, not {length}")
