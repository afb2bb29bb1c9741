"""`mdkern.kernels.backbone.route_experts` in Triton: a program for each row."""

# mypy: ignore-errors
# ruff: noqa: N803, N806

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.route_experts import SMALL, Routing, route_experts_reference, route_outputs

MOST_EXPERTS = 1024  # that a warp holds in registers


@triton.jit
def _best(value, free, each, most):
    """Index of the highest value that is free, the first of equal ones; one in 0..most if there is none."""
    highest = tl.max(tl.max(tl.where(free, value, float("-inf")), 1), 0)
    equal = free & (value == highest)
    return tl.min(tl.min(tl.where(equal, each, most), 1), 0)


@triton.jit(do_not_specialize=["rows"])
def route_experts_kernel(
    products,  # [P, N, E]
    bias,  # [E]
    weights,  # output [N, K + always]
    index,  # output [N, K + always]
    rows,
    factor,
    PARTS: tl.constexpr,  # P
    EXPERTS: tl.constexpr,  # E
    COUNT: tl.constexpr,  # K
    ALWAYS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISED: tl.constexpr,
    BIAS_COUNTS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # powers of two
    EACH_BLOCK: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    EACH: tl.constexpr = EXPERTS // GROUPS
    group = tl.arange(0, GROUP_BLOCK)[:, None]
    within = tl.arange(0, EACH_BLOCK)[None, :]
    each = group * EACH + within
    there = (group < GROUPS) & (within < EACH)
    product = tl.zeros([GROUP_BLOCK, EACH_BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        at = products + (part * rows + row) * EXPERTS + each
        product += tl.load(at, mask=there, other=0.0).to(tl.float32)
    product = tl.where(there, product, float("-inf"))
    bad = tl.max(tl.max((product != product).to(tl.int32), 1), 0) > 0
    if SOFTMAX:
        score = tl.exp(product - tl.max(tl.max(product, 1), 0))
        score = score / tl.sum(tl.sum(score, 1), 0)
    else:
        score = tl.sigmoid(product)
    ranked = score
    if bias is not None:
        ranked += tl.load(bias + each, mask=there, other=0.0).to(tl.float32)
    own = ranked if BIAS_COUNTS else score
    free = there
    if GROUPS > 1:
        best = tl.max(tl.where(there, ranked, float("-inf")), 1)
        first = tl.min(tl.where(there & (ranked == best[:, None]), within, EACH_BLOCK), 1)
        second = tl.max(tl.where(there & (within != first[:, None]), ranked, float("-inf")), 1)
        both = (best + second if EACH > 1 else best)[:, None]
        kept = tl.zeros([GROUP_BLOCK, 1], tl.int1)
        for _ in tl.static_range(KEPT_GROUPS):
            kept = kept | (group == _best(both, (group < GROUPS) & (kept == 0), group, GROUPS - 1))
        free = there & kept
    place = tl.arange(0, COUNT_BLOCK)
    chosen = EXPERTS + place - COUNT  # of those that are always chosen
    share = tl.where(place < COUNT, 0.0, 1.0)
    total = SMALL
    for k in tl.static_range(COUNT):
        expert = _best(ranked, free, each, EXPERTS - 1)
        value = tl.sum(tl.sum(tl.where(each == expert, tl.where(there, own, 0.0), 0.0), 1), 0)
        free = free & (each != expert)
        chosen = tl.where(place == k, expert, chosen)
        share = tl.where(place == k, value, share)
        total += value
    scale = factor / total if NORMALISED else factor
    share = tl.where(place < COUNT, share * scale, share)
    at = row * (COUNT + ALWAYS) + place
    tl.store(weights + at, tl.where(bad, float("nan"), share), mask=place < COUNT + ALWAYS)
    tl.store(index + at, chosen.to(tl.int64), mask=place < COUNT + ALWAYS)


def route_experts(products: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """`route_experts` on a GPU (or, on the CPU, in Triton's interpreter)."""
    parts, rows, experts = products.shape
    if products.dtype == torch.float64 or experts > MOST_EXPERTS:
        return route_experts_reference(products, bias, routing)
    weights, index = route_outputs(products, bias, routing)
    if rows:
        route_experts_kernel[(rows,)](
            products.contiguous(),
            None if bias is None else bias.contiguous(),
            weights,
            index,
            rows,
            float(routing.factor),
            PARTS=parts,
            EXPERTS=experts,
            COUNT=routing.chosen,
            ALWAYS=routing.always,
            SOFTMAX=routing.softmax,
            NORMALISED=routing.normalised,
            BIAS_COUNTS=routing.bias_counts,
            GROUPS=routing.groups,
            KEPT_GROUPS=routing.kept_groups,
            GROUP_BLOCK=triton.next_power_of_2(routing.groups),
            EACH_BLOCK=triton.next_power_of_2(experts // routing.groups),
            COUNT_BLOCK=triton.next_power_of_2(routing.chosen + routing.always),
            SMALL=SMALL,
            num_warps=1,
        )
    return weights, index
