"""`mdkern.kernels.backbone.sandwich` in Triton: each program holds a whole row in registers."""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.modulated_norm import fits
from mdkern.kernels.backbone.sandwich import (
    choose_experts_reference,
    expert_outputs,
    sandwich_norm_reference,
    sandwich_outputs,
)
from mdkern.kernels.backbone.triton_modulated_norm import unit_stride

MOST_EXPERTS = 4096


@triton.jit
def _norm(row, weight, column, within, eps, WIDTH: tl.constexpr):
    scale = 1.0 / tl.sqrt_rn(tl.sum(row * row, 0) / WIDTH + eps)
    return row * scale * tl.load(weight + column, mask=within, other=0.0).to(tl.float32)


@triton.jit
def sandwich_norm_kernel(
    stream,  # [N, D]
    first,
    second,  # or None
    new,  # output [N, D]
    first_normed,  # output [N, D] or None, of each norm that comes after
    second_normed,
    third_normed,
    first_weight,  # [D]
    second_weight,
    outer_weight,  # or None
    factor,  # [1] or None
    after_first,  # [D] or None
    after_second,
    after_third,
    eps,
    WIDTH: tl.constexpr,  # D
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    read = start + column
    update = tl.load(first + read, mask=within, other=0.0).to(tl.float32)
    update = _norm(update, first_weight, column, within, eps, WIDTH)
    if second is not None:
        beside = tl.load(second + read, mask=within, other=0.0).to(tl.float32)
        update += _norm(beside, second_weight, column, within, eps, WIDTH)
    if outer_weight is not None:
        update = _norm(update, outer_weight, column, within, eps, WIDTH)
    held = tl.load(stream + read, mask=within, other=0.0).to(tl.float32) + update
    if factor is not None:
        held = held * tl.load(factor).to(tl.float32)
    stored = held.to(new.dtype.element_ty)
    tl.store(new + read, stored, mask=within)
    held = stored.to(tl.float32)
    element = new.dtype.element_ty
    if after_first is not None:
        row = _norm(held, after_first, column, within, eps, WIDTH).to(element)
        tl.store(first_normed + read, row, mask=within)
    if after_second is not None:
        row = _norm(held, after_second, column, within, eps, WIDTH).to(element)
        tl.store(second_normed + read, row, mask=within)
    if after_third is not None:
        row = _norm(held, after_third, column, within, eps, WIDTH).to(element)
        tl.store(third_normed + read, row, mask=within)


@triton.jit
def choose_experts_kernel(
    scores,  # [N, E]
    scales,  # [E]
    weights,  # output [N, K]
    index,  # output [N, K]
    scores_stride,
    factor,
    EXPERTS: tl.constexpr,  # E
    COUNT: tl.constexpr,  # K
    BLOCK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCK)
    place = tl.arange(0, COUNT_BLOCK)
    score = tl.load(scores + row * scores_stride + each, mask=each < EXPERTS, other=float("-inf")).to(tl.float32)
    bad = tl.max((score != score).to(tl.int32), 0) > 0
    value = tl.full([COUNT_BLOCK], float("-inf"), tl.float32)
    chosen = tl.zeros([COUNT_BLOCK], tl.int32)
    free = each < EXPERTS
    for k in tl.static_range(COUNT):
        highest = tl.max(tl.where(free, score, float("-inf")), 0)
        best = tl.min(tl.where(free & (score == highest), each, EXPERTS - 1), 0)
        value = tl.where(place == k, highest, value)
        chosen = tl.where(place == k, best, chosen)
        free = free & (each != best)
    share = tl.exp((value - tl.max(value, 0)) * factor)
    share = share / tl.sum(share, 0) * tl.load(scales + chosen).to(tl.float32)
    at = row * COUNT + place
    tl.store(weights + at, tl.where(bad, float("nan"), share), mask=place < COUNT)
    tl.store(index + at, chosen.to(tl.int64), mask=place < COUNT)


def sandwich_norm(
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
    """`sandwich_norm` on a GPU (or, on the CPU, in Triton's interpreter)."""
    given = stream, first, first_weight, second, second_weight, outer_weight, factor, after, eps
    if not fits(stream):
        return sandwich_norm_reference(*given)
    new, normed = sandwich_outputs(*given)
    rows, width = stream.shape
    if rows and width:
        block = triton.next_power_of_2(width)
        weights = [unit_stride(weight) for weight in (first_weight, second_weight, outer_weight)]
        none = [None] * (3 - len(after))
        following = [unit_stride(weight) for weight in after] + none
        sandwich_norm_kernel[(rows,)](
            stream,
            first,
            second,
            new,
            *normed,
            *none,
            *weights,
            factor,
            *following,
            eps,
            WIDTH=width,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return new, normed


def choose_experts(scores: Tensor, scales: Tensor, count: int, factor: float) -> tuple[Tensor, Tensor]:
    """`choose_experts` on a GPU (or, on the CPU, in Triton's interpreter)."""
    rows, experts = scores.shape
    if scores.dtype == torch.float64 or experts > MOST_EXPERTS:
        return choose_experts_reference(scores, scales, count, factor)
    scores = unit_stride(scores)
    weights, index = expert_outputs(scores, scales, count)
    if rows:
        choose_experts_kernel[(rows,)](
            scores,
            scales.contiguous(),
            weights,
            index,
            scores.stride(0),
            factor,
            EXPERTS=experts,
            COUNT=count,
            BLOCK=triton.next_power_of_2(experts),
            COUNT_BLOCK=triton.next_power_of_2(count),
            num_warps=1,
        )
    return weights, index
