"""`fold_norm`: a layer normalisation and its constant modulation, folded into the matrix product that follows them.

With ``m = norm_weight * (1 + scale)``, the product of a normed row is

    (rstd * (x - mean) * m + shift) @ W.T = rstd * (x @ Wm.T) + W @ shift,

where Wm is ``W * m`` with the mean of each row subtracted. The mean of `x` drops out because each row of Wm sums to 0.
So the product reads the residual stream directly, and its epilogue multiplies each row by one number, ``rstd``. The
rows of Wm sum to 0 after rounding, too, so that no part of the product's error grows with the mean.

This file has the contract and the reference in plain PyTorch; `triton_folded_norm` is the GPU kernel.
"""

from __future__ import annotations

from pkgutil import resolve_name

import torch
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.norm_constants import EPS, NEAR_ZERO, ROUNDS
from mdkern.kernels.checks import check_written
from mdkern.kernels.device import has_triton
from mdkern.kernels.operator import operator

LAUNCHER = "mdkern.kernels.backbone.triton_folded_norm:fold_norm"
SPAN = 256  # columns that one sum of a row covers: the width of a column tile of the product that writes the sums


def fold_norm_reference(
    folded: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    shift: Tensor,
    scale: Tensor,
) -> None:
    """`fold_norm` in plain PyTorch."""
    full = weight.to(wide(weight))
    added.copy_(full @ shift.to(full.dtype) + (0 if bias is None else bias))
    exact = full * (norm_weight * (1 + scale.to(full.dtype)))
    exact -= exact.mean(1, keepdim=True)
    near = exact.abs() < NEAR_ZERO * exact.square().mean(1, keepdim=True).sqrt()
    near |= ~near.any(1, keepdim=True)
    for _ in range(ROUNDS):
        left = exact.to(folded.dtype).to(full.dtype).sum(1, keepdim=True)
        exact -= torch.where(near, left / near.sum(1, keepdim=True), 0)
    rounded = exact.to(folded.dtype)
    smallest = exact.abs().argmin(1, keepdim=True)
    left = rounded.to(full.dtype).sum(1, keepdim=True)
    folded.copy_(rounded.scatter(1, smallest, (rounded.gather(1, smallest) - left).to(folded.dtype)))


def row_sums(x: Tensor, span: int = SPAN) -> Tensor:
    """Sum and sum of squares of every `span` columns of each row: ``x [N, C]`` -> float ``[C / span, 2, N]``."""
    spans = x.to(wide(x)).unflatten(1, (-1, span))
    return torch.stack((spans.sum(2), spans.square().sum(2))).permute(2, 0, 1).contiguous()


def one_over_spread(sums: Tensor, columns: int) -> Tensor:
    """``rstd [N]``, one over the standard deviation of each row of `columns` numbers, from its `row_sums`.

    The relative error in float32 is 2e-4 where the mean is 50 times the standard deviation, 3e-3 where it is 200 times.
    """
    mean, square = sums.sum(0) / columns
    return (square - mean.square()).clamp(min=0).add(EPS).rsqrt()


fold_norm_operator = operator(
    fold_norm_reference,
    lambda *_: None,
    LAUNCHER,
    mutates=("folded", "added"),
    name="fold_norm",
)


def new_sums(x: Tensor, span: int = SPAN) -> Tensor:
    """An uninitialised tensor of the shape and dtype of `row_sums(x, span)`."""
    return x.new_empty((x.shape[1] // span, 2, x.shape[0]), dtype=wide(x))


def fold_norm(
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    norm_weight: Tensor,  # [D]
    shift: Tensor,  # [D]
    scale: Tensor,  # [D]
    *,
    out: tuple[Tensor, Tensor],
) -> None:
    """Fold a modulated layer normalisation into the weight and bias of the product that follows it.

    ``one_over_spread(row_sums(x))[:, None] * (x @ out[0].T) + out[1]`` is then
    ``modulated_norm(x, norm_weight, shift, scale) @ weight.T + bias``.

    Args:
        weight: floating ``[C, D]``.
        bias: ``[C]``, or None.
        norm_weight, shift, scale: ``[D]``, as for `mdkern.kernels.backbone.modulated_norm`.
        out: the folded weight ``[C, D]`` and bias ``[C]``, written in place. The weight has the dtype of `weight`, and
            each of its rows sums to 0 up to the rounding of the sum.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    folded, added = out
    if folded.shape != weight.shape or folded.dtype != weight.dtype or added.shape != weight.shape[:1]:
        raise ValueError(f"out must be {weight.dtype} {list(weight.shape)} and {list(weight.shape[:1])}")
    check_written("out[0]", folded)
    check_written("out[1]", added)
    for name, vector in (("norm_weight", norm_weight), ("shift", shift), ("scale", scale)):
        if vector.shape != weight.shape[1:]:
            raise ValueError(f"{name} must be [{weight.shape[1]}], not {list(vector.shape)}")
    if bias is not None and bias.shape != added.shape:
        raise ValueError(f"bias must be {list(added.shape)}, not {list(bias.shape)}")
    if not all(tensor.is_contiguous() for tensor in (folded, added)):
        raise ValueError("out is to be contiguous")
    fold = fold_norm_operator
    if has_triton(weight.device) and not torch.compiler.is_compiling():  # each call of `sample` folds every layer
        fold = resolve_name(LAUNCHER)
    fold(folded, added, weight, bias, norm_weight, shift, scale)
