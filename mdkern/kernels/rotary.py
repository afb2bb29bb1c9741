"""`rotary`: rotary position embedding (Su et al., 2104.09864), the two halves of a head paired, in place.

In place on the output of the projection that made the heads, so that attention reads it where it lies. The contract,
and the operator in plain PyTorch; `triton_rotary` runs it on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.vocab_projection import has_triton


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """`rotary` in plain PyTorch."""
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # [N, 1, head_dim / 2]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


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
    from mdkern.kernels import triton_rotary  # imports Triton, which is no business of a machine without a GPU

    triton_rotary.rotary(x, cos, sin, positions, length)


@_rotary.register_fake
def _fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, length: int) -> None:
    return None


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
    half, wide = x.shape[2] // 2, torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 2 or table.shape[1] != half or table.dtype != wide or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous {wide} [P, {half}], not {table.dtype} {list(table.shape)}")
    if positions is None:
        if not 0 < length <= cos.shape[0]:
            raise ValueError(f"length must be in 1..{cos.shape[0]} where no positions are given, not {length}")
    elif positions.shape != x.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions must be int64 [{x.shape[0]}], not {positions.dtype} {list(positions.shape)}")
    _rotary(x, cos, sin, positions, length)
