"""`sandwich_norm`, `choose_experts`: what lies between the products of a Gemma 4 layer, one launch each.

Gemma norms the output of a sublayer, too, before it is added to the residual stream. This file has the contracts and
the references in plain PyTorch; `triton_sandwich` has the GPU kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.rms_norm import normalise
from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator


def sandwich_norm_reference(
    stream: Tensor,
    first: Tensor,
    first_weight: Tensor,
    second: Tensor | None,
    second_weight: Tensor | None,
    outer_weight: Tensor | None,
    factor: Tensor | None,
    after: list[Tensor],
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """`sandwich_norm` in plain PyTorch."""
    update = normalise(first.to(wide(first)), first_weight, eps)
    if second is not None and second_weight is not None:
        update = update + normalise(second.to(wide(second)), second_weight, eps)
    if outer_weight is not None:
        update = normalise(update, outer_weight, eps)
    new = stream.to(update.dtype) + update
    new = (new if factor is None else new * factor.to(new.dtype)).to(stream.dtype)
    return new, [normalise(new, weight, eps).to(stream.dtype) for weight in after]


def sandwich_outputs(stream: Tensor, *rest: object) -> tuple[Tensor, list[Tensor]]:
    after = rest[-2]
    assert isinstance(after, list | tuple)
    return stream.new_empty(*stream.shape), [stream.new_empty(*stream.shape) for _ in after]


def choose_experts_reference(scores: Tensor, scales: Tensor, count: int, factor: float) -> tuple[Tensor, Tensor]:
    """`choose_experts` in plain PyTorch."""
    kind = wide(scores)
    value, index = scores.to(kind).topk(count, dim=-1)
    return ((value * factor).softmax(-1) * scales.to(kind)[index]).float(), index


def expert_outputs(scores: Tensor, scales: Tensor, count: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = scores.shape[0], count
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int64)


KERNELS = "mdkern.kernels.backbone.triton_sandwich"
sandwich_norm_operator = operator(
    sandwich_norm_reference, sandwich_outputs, f"{KERNELS}:sandwich_norm", name="sandwich_norm"
)
choose_experts_operator = operator(
    choose_experts_reference, expert_outputs, f"{KERNELS}:choose_experts", name="choose_experts"
)


def sandwich_norm(
    stream: Tensor,  # [N, D]
    first: Tensor,  # [N, D]
    first_weight: Tensor,  # [D]
    *,
    second: Tensor | None = None,  # [N, D]
    second_weight: Tensor | None = None,  # [D]
    outer_weight: Tensor | None = None,  # [D]
    factor: Tensor | None = None,  # [1]
    after: list[Tensor],  # each [D]
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """``new = (stream + outer(norm(first) + norm(second))) * factor``, and its norms by each weight of `after`.

    Every norm is that of `rms_norm`, with its weight; `outer` is a norm, or nothing without its weight. Everything is
    computed in float32; `new` is rounded once, and normed as it is stored.

    Args:
        stream: floating ``[N, D]``, contiguous: the residual stream, which is not changed.
        first, second: outputs of sublayers, contiguous, of its dtype.
        after: the weights of the sublayers that come next, none to three.

    Returns:
        `new`, and its norms in a list, as tensors of their own: each ``[N, D]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if stream.ndim != 2 or not stream.is_floating_point():
        raise ValueError(f"stream must be floating [N, D], not {stream.dtype} {list(stream.shape)}")
    for name, rows in (("stream", stream), ("first", first), ("second", second)):
        check_tensor(name, rows, stream.shape, stream.dtype, stream.device)
        if rows is not None and not rows.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {rows.stride()}")
    named = (("first_weight", first_weight), ("second_weight", second_weight), ("outer_weight", outer_weight))
    for name, weight in (*named, *(("after", weight) for weight in after)):
        check_tensor(name, weight, stream.shape[1:], stream.dtype if weight is None else weight.dtype, stream.device)
    check_tensor("factor", factor, (1,), stream.dtype if factor is None else factor.dtype, stream.device)
    if (second is None) != (second_weight is None) or len(after) > 3:
        raise ValueError("second needs second_weight, and after has at most 3 weights")
    new, normed = sandwich_norm_operator(
        stream, first, first_weight, second, second_weight, outer_weight, factor, after, eps
    )
    return new, normed


def choose_experts(scores: Tensor, scales: Tensor, count: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The `count` experts of highest score of each row, and their weights.

    A weight is the softmax of ``factor * scores`` over these experts, times the expert's scale.

    Args:
        scores: floating ``[N, E]``.
        scales: floating ``[E]``.

    Returns:
        weights float32 ``[N, K]`` and index int64 ``[N, K]``, in falling order. Of equal scores the lower index may
        come first or not. Rows with NaN give weights of NaN and some index in 0..E-1.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"scores must be floating [N, E], not {scores.dtype} {list(scores.shape)}")
    check_tensor("scales", scales, scores.shape[1:], scales.dtype, scores.device)
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"count must lie in 1..{scores.shape[1]}, not {count}")
    if not factor > 0.0:
        raise ValueError(f"factor must be positive, not {factor}")
    weights, index = choose_experts_operator(scores, scales, count, factor)
    return weights, index
