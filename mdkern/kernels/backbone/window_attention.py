"""`window_attention`: from the projections of a window of a Llama to what its attention gives, in one pass.

It is `place_heads` with a KV cache (norms of heads, rotary position embedding, Su et al., 2104.09864) and the attention
of the window over all columns of that cache, which are two launches else. The result may be rounded to e4m3 for the
product that follows. This file has the contract and the reference in plain PyTorch; `triton_window_attention` has the
GPU kernel. Measurements: docs/notes/llama.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.fp8_skinny import TILE, Tiled, tiled
from mdkern.kernels.backbone.joint import runs_early
from mdkern.kernels.backbone.place_heads import check_heads, place_heads_reference
from mdkern.kernels.backbone.quantise import FP8
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.device import is_hopper
from mdkern.kernels.invariant import is_batch_invariant
from mdkern.kernels.operator import operator

WIDEST, MOST_QUERIES, MOST_KEYS, HEAD_DIM = 64, 1024, 768, 128  # see `runs_window_attention`
MOST_TEXTS, SHORT = 8, 256  # sequences, and columns of the cache, of passes with more queries
FEWEST_ROWS = 32  # queries of a program, of all heads that share keys


def window_attention_reference(
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    columns: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    kept: Tensor,
    mask: Tensor | None,
    scale: float,
    arrived: Tensor,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    """`window_attention` in plain PyTorch."""
    batch, groups = kept.shape[1], query.shape[1] // key.shape[1]
    query, width = query.clone(memory_format=torch.contiguous_format), len(query) // batch if batch else 1
    place_heads_reference(
        cos, sin, query, key, value, positions, width, query_norm, key_norm, eps, kept, columns
    )  # fmt: skip
    queries = query.view(batch, width, *query.shape[1:]).transpose(1, 2)
    keys, values = kept[:, :, :-1].transpose(2, 3)
    if any(stride * kept.element_size() % 16 for stride in kept.stride()[:4]):
        keys, values = keys.contiguous(), values.contiguous()  # kernels of PyTorch may read 16 bytes at a time
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=groups > 1)
    out = attended.transpose(1, 2).flatten(2).flatten(0, 1)
    if not rounded:
        return out, out.new_empty(0, dtype=torch.float32)
    return tuple(tiled(out))  # type: ignore[return-value]


def new_attended(cos: Tensor, sin: Tensor, query: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    rows, columns = query.shape[0], query.shape[1] * query.shape[2]
    rounded = bool(others[-1])
    out = torch.empty((rows, columns), dtype=FP8 if rounded else query.dtype, device=query.device)
    scales = (rows, columns // TILE) if rounded else (0,)
    return out, torch.empty(scales, dtype=torch.float32, device=query.device)


window_attention_operator = operator(
    window_attention_reference,
    new_attended,
    "mdkern.kernels.backbone.triton_window_attention:window_attention",
    mutates=("kept", "arrived"),
    name="window_attention",
)


def runs_window_attention(
    batch: int, width: int, heads: int, groups: int, keys: int, head_dim: int, dtype: torch.dtype,
    device: torch.device, fp8: bool
) -> bool:  # fmt: skip
    """Whether the kernel was the fast way for windows of this shape, without a mask, on the card that it was measured
    on. Of longer caches PyTorch's attention is faster, and of more queries, but in passes that are launched early
    (`joint.runs_early`); of fewer heads of keys none were measured.

    Args:
        heads: of keys and values.
        groups: heads of queries that share a head of keys.
        keys: columns of the cache.
        fp8: whether the products of the pass are in e4m3.
    """
    early = not fp8 and runs_early(batch * width, heads * groups * head_dim, device)
    several = early and batch <= MOST_TEXTS and width <= FEWEST_ROWS and keys <= SHORT
    few = width <= WIDEST and batch * heads * width <= MOST_QUERIES and keys <= MOST_KEYS
    measured = groups == 1 and head_dim == HEAD_DIM and dtype == torch.bfloat16
    return is_hopper(device) and (few or several) and measured and not is_batch_invariant()


def new_arrivals(batch: int, width: int, heads: int, groups: int, device: torch.device) -> Tensor:
    """What `window_attention` counts with, for windows of this shape: zeros, which it leaves as zeros."""
    return torch.zeros(batch * heads * -(-groups * width // FEWEST_ROWS), dtype=torch.int32, device=device)


def window_attention(
    cos: Tensor,  # [P, R]
    sin: Tensor,  # [P, R]
    query: Tensor,  # [N, Hq, head_dim]
    key: Tensor,  # [N, H, head_dim]
    value: Tensor,  # [N, H, head_dim]
    *,
    positions: Tensor | None = None,  # [N]
    columns: Tensor,  # [N]
    kept: Tensor,  # [2, B, L + 1, H, head_dim]
    arrived: Tensor,  # [n]
    query_norm: Tensor | None = None,  # [head_dim]
    key_norm: Tensor | None = None,  # [head_dim]
    eps: float = 0.0,
    mask: Tensor | None = None,
    scale: float | None = None,
    rounded: bool = False,
) -> Tensor | Tiled:
    """Norm and rotate queries and keys, write keys and values to a cache, and attend to its first L columns.

    What is rotated, and how, is said at `place_heads`. Neither queries nor keys are changed in place, and what column L
    of the cache holds afterwards is undefined. On a GPU the kernel may begin before the one before it on its stream has
    ended, and reads everything but queries, keys, values and `arrived` at once: that one must not write it.

    Args:
        cos, sin: float32, contiguous, with R at most head_dim / 2.
        query, key, value: floating, each row contiguous, any row stride. N = B * W, sequence after sequence.
        positions: int64 or int32 in 0..P-1; others give NaN. None: row n is at position ``n % W``.
        columns: int64 or int32 in 0..L, distinct in a sequence except for L: where row n is written.
        kept: rotated keys, and values; any strides, but each head contiguous.
        arrived: of `new_arrivals`, and not in use by a call that may run at the same time.
        query_norm, key_norm: weights of a norm of each head before it is rotated, as by `rms_norm`, with `eps`.
        mask: bool ``[B or 1, 1, W or 1, L]``, what the rows see; None: everything. A row that sees nothing gives 0.
        scale: above 0, of the products of queries and keys; None: ``head_dim ** -0.5``.
        rounded: whether the result is in e4m3; then head_dim must be `TILE`.

    Returns:
        ``[N, Hq * head_dim]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    batch = kept.shape[1] if kept.ndim == 5 else -1
    if batch < 0 or query.ndim != 3 or query.shape[0] % max(1, batch):
        raise ValueError(f"queries {list(query.shape)} do not fit a cache {list(kept.shape)}")
    rows, heads, head_dim = query.shape
    width, length = rows // batch if batch else 1, kept.shape[2] - 1
    check_heads(
        cos, sin, query, key, value, positions=positions, length=width, query_norm=query_norm, key_norm=key_norm,
        kept=kept, columns=columns,
    )  # fmt: skip
    if heads % key.shape[1]:
        raise ValueError(f"{heads} heads of queries do not fit {key.shape[1]} of keys")
    if mask is not None and (
        mask.ndim != 4 or mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[3] != length
        or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, width)
    ):  # fmt: skip
        raise ValueError(f"mask must be bool {[batch, 1, width, length]}, not {mask.dtype} {list(mask.shape)}")
    if rounded and head_dim != TILE:
        raise ValueError(f"heads must have {TILE} numbers, which share a scale, to be rounded, not {head_dim}")
    counters = batch * key.shape[1] * -(-(heads // key.shape[1]) * width // FEWEST_ROWS)
    check_tensor("arrived", arrived, (counters,), torch.int32, query.device)
    out, scales = window_attention_operator(
        cos, sin, query, key, value, positions, columns, query_norm, key_norm, eps, kept, mask,
        head_dim**-0.5 if scale is None else scale, arrived, rounded,
    )  # fmt: skip
    return Tiled(out, scales) if rounded else out
