"""`place_heads`: all that lies between a Llama's projections and its attention, in one pass.

Queries and keys are normed head by head (in Qwen 3) and rotated (rotary position embedding, Su et al., 2104.09864), and
keys and values are written to their places in a KV cache. This file has the contract and the reference in plain
PyTorch; `triton_place_heads` has the GPU kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.backbone.rms_norm import normalise
from mdkern.kernels.backbone.rotary import check_angles, rotary_reference
from mdkern.kernels.checks import check_rows_apart, check_tensor
from mdkern.kernels.operator import operator


def place_heads_reference(
    cos: Tensor,
    sin: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    positions: Tensor | None,
    length: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    kept: Tensor | None,
    columns: Tensor | None,
) -> None:
    """`place_heads` in plain PyTorch."""
    if query is not None:
        turn(query, cos, sin, positions, length, query_norm, eps)
    if key is None:
        return
    if kept is None:
        turn(key, cos, sin, positions, length, key_norm, eps)
        return
    assert value is not None
    key = key.clone()
    turn(key, cos, sin, positions, length, key_norm, eps)
    row = torch.arange(len(key), device=key.device)
    column = row % length if columns is None else columns
    for old, new in zip(kept, (key, value)):
        old[row // length, column] = new.to(old.dtype)


def turn(
    heads: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, length: int, norm: Tensor | None, eps: float
) -> None:
    """Norm and rotate heads in place."""
    wide = heads.to(cos.dtype)
    if norm is not None:
        wide = normalise(wide, norm, eps)
    wide = wide.clone() if wide is heads else wide
    rotary_reference(wide[..., : 2 * cos.shape[1]], cos, sin, positions, length)
    heads.copy_(wide)


place_heads_operator = operator(
    place_heads_reference,
    lambda *_: None,
    "mdkern.kernels.backbone.triton_place_heads:place_heads",
    mutates=("query", "key", "kept"),
    name="place_heads",
)


def place_heads(
    cos: Tensor,  # [P, R]
    sin: Tensor,  # [P, R]
    query: Tensor | None,  # [N, Hq, head_dim]
    key: Tensor | None = None,  # [N, H, head_dim]
    value: Tensor | None = None,  # [N, H, head_dim]
    *,
    positions: Tensor | None = None,  # [N]
    length: int,
    query_norm: Tensor | None = None,  # [head_dim]
    key_norm: Tensor | None = None,  # [head_dim]
    eps: float = 0.0,
    kept: Tensor | None = None,  # [2, B, L + 1, H, head_dim]
    columns: Tensor | None = None,  # [N]
) -> None:
    """Norm and rotate queries and keys, in place; or write the keys and the values to a KV cache instead.

    Dimension i of the first R of a head is paired with i + R; those from 2R on are not rotated. Everything is computed
    in float32 and rounded once.

    Args:
        cos, sin: float32, contiguous, of the angles of each position, with R at most head_dim / 2.
        query, key, value: floating, each row contiguous, any row stride. With `kept`, `key` is not changed.
        positions: int64 or int32 in 0..P-1; others give NaN where heads are rotated. None: row n is at position
            ``n % length``.
        length: number of rows of each sequence; row n is of sequence ``n // length``.
        query_norm, key_norm: weights of a norm of each head before it is rotated, as by `rms_norm`, with `eps`.
        kept: rotated keys, and values; any strides, but each head contiguous.
        columns: int64 or int32 in 0..L, distinct in a sequence except for L: where row n is written. None:
            ``n % length``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_heads(
        cos, sin, query, key, value, positions=positions, length=length, query_norm=query_norm, key_norm=key_norm,
        kept=kept, columns=columns,
    )  # fmt: skip
    place_heads_operator(cos, sin, query, key, value, positions, length, query_norm, key_norm, eps, kept, columns)


def check_heads(
    cos: Tensor,
    sin: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    *,
    positions: Tensor | None,
    length: int,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    kept: Tensor | None,
    columns: Tensor | None,
) -> None:
    """Refuse arguments of `place_heads` that do not fit."""
    first = query if query is not None else key
    if first is None:
        raise ValueError("queries or keys must be given")
    half = first.shape[-1] // 2
    check_angles(first, min(half, cos.shape[-1]), cos, sin)
    for name, heads in (("query", query), ("key", key), ("value", value)):
        if heads is None:
            continue
        if heads.ndim != 3 or heads.shape[2] != 2 * half or not heads.is_floating_point():
            raise ValueError(f"{name} must be floating [N, heads, {2 * half}], not {heads.dtype} {list(heads.shape)}")
        check_tensor(name, heads, (first.shape[0], *heads.shape[1:]), first.dtype, first.device)
        if heads.stride(2) != 1 or (heads.shape[1] > 1 and heads.stride(1) != heads.shape[2]):
            raise ValueError(f"the heads of a row of {name} must lie together, not at strides {heads.stride()}")
        check_rows_apart(name, heads)
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        check_tensor(name, norm, (2 * half,), first.dtype if norm is None else norm.dtype, first.device)
    for name, index in (("positions", positions), ("columns", columns)):
        check_tensor(name, index, first.shape[:1], (torch.int64, torch.int32), first.device)
    if length < 1 or first.shape[0] % length:
        raise ValueError(f"length must divide the {first.shape[0]} rows, not {length}")
    if (positions is None and length > len(cos)) or (columns is not None and kept is None):
        raise ValueError(f"{len(cos)} angles are not enough for {length} positions, or columns without a cache")
    check_kept(kept, key, value, length, columns)


def check_kept(
    kept: Tensor | None, key: Tensor | None, value: Tensor | None, length: int, columns: Tensor | None
) -> None:
    if kept is None:
        return
    if key is None or value is None or value.shape != key.shape:
        raise ValueError("keys and values of one shape are needed for a cache")
    sequences = key.shape[0] // length
    shape = (2, sequences, kept.shape[2] if kept.ndim == 5 else 0, *key.shape[1:])
    check_tensor("kept", kept, shape, key.dtype, key.device)
    if kept.stride(4) != 1 or (columns is None and length >= kept.shape[2]):
        raise ValueError(f"kept must have heads together and more than {length} columns, not {list(kept.shape)}")
