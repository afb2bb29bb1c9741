"""`linear_rotary`, `linear_gelu`, `linear_residual`: a transformer's matrix products, fused with the next operation.

This file has the contracts and the references in plain PyTorch. `hopper_linear` and `hopper_residual` are the kernels
for many rows on a Hopper GPU; elsewhere the reference runs. Measurements: docs/notes/backbone.md.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.folded_norm import SPAN, new_sums, one_over_spread, row_sums
from mdkern.kernels.backbone.invariant_linear import invariant_linear
from mdkern.kernels.backbone.modulated_norm import per_row, wide
from mdkern.kernels.backbone.rotary import check_angles, check_heads, check_length, rotary
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.device import copies_in_bulk, is_hopper
from mdkern.kernels.invariant import is_batch_invariant, rows_to_choose_by
from mdkern.kernels.operator import operator

COLUMN_TILE = SPAN
MIDDLE_ROWS = 512  # with fewer, cuBLAS divides the inner dimension, too
NARROW_ROWS = 256  # of less than `COLUMN_TILE` columns: one text and sixteen then take the same kernels, and so tokens
MOST_MIDDLE_ROWS = 1280  # with more, of at least 256 columns, cuBLAS makes up for what follows its products
MIDDLE_PART = 64  # columns of the smallest tile of `triton_linear`
MIDDLE_HALF = 32  # half of the heads that it rotates
MOST_ALIKE_ROWS = 2048  # in the batch-invariant mode `triton_linear` adds products of as many to the stream
FEWEST_ROWS = 4096  # with fewer, column tiles of 256 leave most multiprocessors of a Hopper GPU without work


def product_of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``. Inside of operators the batch-invariant mode does not replace PyTorch's functions."""
    return invariant_linear(x, weight, bias) if is_batch_invariant() else F.linear(x, weight, bias)


def product_reference(x: Tensor, weight: Tensor, bias: Tensor | None, sums: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``; with `sums`, each row of the product is divided by the standard deviation of its row."""
    if sums is None:
        return product_of(x, weight, bias)
    product = product_of(x.to(wide(x)), weight.to(wide(x))) * one_over_spread(sums, x.shape[1])[:, None]
    return (product if bias is None else product + bias).to(x.dtype)


def linear_rotary_reference(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    length: int,
    bias: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """`linear_rotary` in plain PyTorch: a product, then a pass over its output."""
    product = product_reference(x, weight, bias, sums)
    rotary(product.view(x.shape[0], -1, 2 * cos.shape[1])[:, :heads], cos, sin, length=length)
    return product


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor, sums: Tensor | None = None) -> Tensor:
    """`linear_gelu` in plain PyTorch; on a GPU the GELU is the epilogue of cuBLASLt's product where there is one."""
    private = hasattr(torch, "_addmm_activation")  # a private name, which may be removed
    if x.is_cuda and sums is None and private and not is_batch_invariant():
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    return F.gelu(product_reference(x, weight, bias, sums), approximate="tanh")


def linear_residual_reference(
    stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, sums: Tensor | None
) -> None:
    """`linear_residual` in plain PyTorch: a product, then a pass over its output."""
    stream.copy_(stream.to(wide(stream)) + per_row(gate, stream) * product_of(x, weight, bias))
    if sums is not None:
        sums.copy_(row_sums(stream, stream.shape[1] // sums.shape[0]))


def linear_rotary_on_gpu(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    length: int,
    bias: Tensor | None,
    sums: Tensor | None,
) -> Tensor:
    kernels = launcher(x, weight, sums, x.shape[1], MOST_MIDDLE_ROWS)
    in_the_middle = kernels is not None and not runs_fused(x, weight)
    if kernels is None or not (cos.shape[1] == MIDDLE_HALF if in_the_middle else rotates_fused(cos, heads)):
        return linear_rotary_reference(x, weight, cos, sin, heads, length, bias, sums)
    out = new_product(x, weight)
    rotated = heads * 2 * cos.shape[1]
    kernels.linear(x, weight, out, bias=bias, cos=cos, sin=sin, length=length, rotated=rotated, sums=sums)
    return out


def linear_gelu_on_gpu(x: Tensor, weight: Tensor, bias: Tensor, sums: Tensor | None) -> Tensor:
    kernels = launcher(x, weight, sums, x.shape[1], MOST_MIDDLE_ROWS)
    if kernels is None:
        return linear_gelu_reference(x, weight, bias, sums)
    out = new_product(x, weight)
    kernels.linear(x, weight, out, bias=bias, gelu=True, sums=sums)
    return out


def linear_residual_on_gpu(
    stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, sums: Tensor | None
) -> None:
    in_place = adds_in_place(x, weight, gate, sums is not None)
    kernels = launcher(x, weight, sums, weight.shape[0], MOST_ALIKE_ROWS) if in_place else None
    if kernels is None:
        linear_residual_reference(stream, x, weight, bias, gate, sums)
    else:
        kernels.linear_residual(stream, x, weight, bias, gate, sums)


def launcher(x: Tensor, weight: Tensor, sums: Tensor | None, columns: int, most: int) -> ModuleType | None:
    """The module whose kernels run a product, if their `sums`, over rows of `columns` numbers, are in its spans.

    Without sums `triton_linear` is no faster than cuBLAS and a pass of its own for what follows. In the batch-invariant
    mode it runs at most `most` rows of what is `runs_fused`, with or without sums and with the same bits.
    """
    if sums is not None and columns != sums.shape[0] * span_of_sums(x.shape[0], columns):
        return None
    if runs_fused(x, weight) and not (is_batch_invariant() and x.shape[0] <= most):
        from mdkern.kernels.backbone import launch_linear

        return launch_linear
    if runs_fused(x, weight) or (sums is not None and runs_in_the_middle(x, weight)):
        from mdkern.kernels.backbone import triton_linear

        return triton_linear
    return None


def new_product(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    """An uninitialised tensor for ``x @ weight.T``."""
    return x.new_empty(x.shape[0], weight.shape[0])


HERE = "mdkern.kernels.backbone.linear"
linear_rotary_operator = operator(
    linear_rotary_reference, new_product, f"{HERE}:linear_rotary_on_gpu", name="linear_rotary"
)
linear_gelu_operator = operator(linear_gelu_reference, new_product, f"{HERE}:linear_gelu_on_gpu", name="linear_gelu")
linear_residual_operator = operator(
    linear_residual_reference,
    lambda *_: None,
    f"{HERE}:linear_residual_on_gpu",
    mutates=("stream", "sums"),
    name="linear_residual",
)


def runs_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether a Hopper kernel runs the product: many rows, whole column tiles, matrices that bulk copies can read."""
    return (
        rows_to_choose_by(x.shape[0]) >= FEWEST_ROWS
        and weight.shape[0] % COLUMN_TILE == 0
        and not (x.shape[1] < COLUMN_TILE and has_few_rows(x.shape[0], x.shape[1]))
        and reads_in_bulk(x, weight)
    )


def runs_in_the_middle(x: Tensor, weight: Tensor) -> bool:
    """Whether `triton_linear` runs the product: too few tiles for `runs_fused`, too many rows for memory to tell."""
    columns, inner = weight.shape
    return (
        has_few_rows(x.shape[0], min(columns, inner))
        and columns % MIDDLE_PART == 0
        and inner % MIDDLE_PART == 0
        and reads_in_bulk(x, weight)
    )


def has_few_rows(rows: int, width: int) -> bool:
    """Whether there are so few rows, of a stream of so many columns, that `triton_linear` is the fast way.

    4,096 of narrow ones count as few: they make half as many tiles for `runs_fused` as there are multiprocessors.
    """
    narrow = (NARROW_ROWS, FEWEST_ROWS)
    least, most = narrow if width < COLUMN_TILE else (MIDDLE_ROWS, min(MOST_MIDDLE_ROWS, FEWEST_ROWS - 1))
    return least <= rows <= most and not is_batch_invariant()


def reads_in_bulk(x: Tensor, weight: Tensor) -> bool:
    """Whether bulk copies on a Hopper GPU can read both operands, in 16 bits."""
    return (
        is_hopper(x.device)
        and x.dtype in (torch.bfloat16, torch.float16)
        and copies_in_bulk(x)
        and copies_in_bulk(weight)
    )


def span_of_sums(rows: int, width: int) -> int:
    """Columns of each sum that `linear_residual` writes for so many rows of a stream of so many columns."""
    if not (has_few_rows(rows, width) or (is_batch_invariant() and rows <= MOST_ALIKE_ROWS)):
        return SPAN
    return 2 * MIDDLE_PART if width >= COLUMN_TILE and width % (2 * MIDDLE_PART) == 0 else MIDDLE_PART


def sums_of_stream(stream: Tensor) -> Tensor:
    """Room for the sums that `linear_residual` writes of such a stream, in the spans of the kernel that runs it."""
    return new_sums(stream, span_of_sums(*stream.shape))


def folds(rows: int, width: int, cos: Tensor, heads: int) -> bool:
    """Whether norms can be left to the products of so many rows, as their kernels read and write the rows' sums."""
    if has_few_rows(rows, width):
        return width % MIDDLE_PART == 0 and cos.shape[1] == MIDDLE_HALF
    return rows_to_choose_by(rows) >= FEWEST_ROWS and width % SPAN == 0 and rotates_fused(cos, heads)


def rotates_fused(cos: Tensor, heads: int) -> bool:
    """Whether `hopper_linear` can rotate such heads."""
    return cos.shape[1] in (32, 64) and heads * cos.shape[1] % 64 == 0


def adds_in_place(x: Tensor, weight: Tensor, gate: Tensor, summed: bool = False) -> bool:
    """Whether `linear_residual`, with sums or without, is one pass. If not, the norm that follows should add."""
    whole = gate.ndim == 1 or (not is_batch_invariant() and (x.shape[0] // gate.shape[0]) % 64 == 0)
    fused = (runs_fused(x, weight) and whole) or (summed and runs_in_the_middle(x, weight))
    return fused and gate.stride(-1) == 1


def linear_rotary(
    x: Tensor,  # [N, K]
    weight: Tensor,  # [C, K]
    cos: Tensor,  # [P, head_dim / 2]
    sin: Tensor,  # [P, head_dim / 2]
    *,
    heads: int,
    length: int,
    bias: Tensor | None = None,  # [C]
    sums: Tensor | None = None,  # [spans of K, 2, N]
) -> Tensor:
    """``x @ weight.T + bias`` with rotary embedding of the first `heads` heads; row n is at position ``n % length``.

    Args:
        x: floating ``[N, K]``.
        weight: same dtype, ``[C, K]``: the projections to queries, keys and values in this order, or some of them.
        cos, sin: as for `mdkern.kernels.backbone.rotary`.
        heads: number of heads to rotate; the columns after them are not.
        length: positions of a sequence, at most P.
        bias: same dtype, ``[C]``.
        sums: float32, `folded_norm.row_sums` of `x`. Each row of the product is divided by the standard deviation of
            its row of `x`, which makes it the product of a layer normalisation if the rows of `weight` sum to 0.

    Returns:
        ``[N, C]`` of the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_product(x, weight, bias, sums)
    check_angles(x, sin.shape[-1], cos, sin)
    check_heads(heads, weight.shape[0], cos)
    check_length(length, cos)
    product: Tensor = linear_rotary_operator(x, weight, cos, sin, heads, length, bias, sums)
    return product


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, sums: Tensor | None = None) -> Tensor:
    """``gelu(x @ weight.T + bias)`` in the tanh form.

    Args:
        x: floating ``[N, K]``.
        weight, bias: same dtype, ``[C, K]`` and ``[C]``.
        sums: as for `linear_rotary`.

    Returns:
        ``[N, C]`` of the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_product(x, weight, bias, sums)
    product: Tensor = linear_gelu_operator(x, weight, bias, sums)
    return product


def linear_residual(
    stream: Tensor,  # [N, C]
    x: Tensor,  # [N, K]
    weight: Tensor,  # [C, K]
    bias: Tensor | None,  # [C]
    gate: Tensor,  # [C] or [S, C]
    *,
    sums: Tensor | None = None,  # [spans of C, 2, N]
) -> None:
    """``stream += gate * (x @ weight.T + bias)`` in place, rounded once.

    Args:
        stream: floating ``[N, C]``, contiguous.
        x, weight, bias: of the same dtype.
        gate: of the same dtype, ``[C]`` for all rows or ``[S, C]`` for S sequences, as in `modulated_norm`.
        sums: float32, written in place if given: `folded_norm.row_sums` of the new rows. The Hopper kernel sums the
            rows before they are rounded.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_product(x, weight, bias)
    if stream.shape != (x.shape[0], weight.shape[0]) or stream.dtype != x.dtype or not stream.is_contiguous():
        raise ValueError(
            f"stream must be contiguous {x.dtype} {[x.shape[0], weight.shape[0]]}, "
            f"not {stream.dtype} {list(stream.shape)}"
        )
    sequences = gate.shape[0] if gate.ndim == 2 else 1
    if gate.ndim not in (1, 2) or gate.shape[-1] != weight.shape[0] or not sequences or x.shape[0] % sequences:
        raise ValueError(f"gate must be [C] or [S, C] with S dividing {x.shape[0]} rows, not {list(gate.shape)}")
    if sums is not None:
        check_sums(sums, stream)
    linear_residual_operator(stream, x, weight, bias, gate, sums)


def check_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, sums: Tensor | None = None) -> None:
    check_tensor("x", x, x.shape, x.dtype, x.device)
    check_tensor("weight", weight, weight.shape, weight.dtype, x.device)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"weight must be {x.dtype} [C, {x.shape[-1]}] for x {list(x.shape)}, "
            f"not {weight.dtype} {list(weight.shape)}"
        )
    check_tensor("bias", bias, weight.shape[:1], weight.dtype, x.device)
    if bias is not None and not bias.is_contiguous():
        raise ValueError(f"bias must be contiguous, not of strides {bias.stride()}")
    if sums is not None:
        check_sums(sums, x)


def check_sums(sums: Tensor, x: Tensor) -> None:
    columns, spans = x.shape[1], sums.shape[0] if sums.ndim else 0
    whole = spans > 0 and columns % spans == 0 and sums.shape == (spans, 2, x.shape[0])
    if not whole or sums.dtype != wide(x) or not sums.is_contiguous():
        raise ValueError(
            f"sums of rows {list(x.shape)} must be contiguous {wide(x)} [spans of the {columns} columns, 2,"
            f" {x.shape[0]}], not {sums.dtype} {list(sums.shape)}"
        )
