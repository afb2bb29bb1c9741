"""`mdkern.kernels.backbone.experts` in Triton.

The pairs of a row and one of its experts are sorted by expert. Each program of a product then has some columns of one
expert's weights, and a tile of its rows. With few rows the time is that of reading the weights, which are the left
operand for the reason given in `triton_skinny`. Programs of one expert run side by side, so that its weights are read
from memory once, and in the order in which they lie there.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mdkern.kernels.backbone.experts import gated_experts_reference, listed_experts_reference
from mdkern.kernels.backbone.triton_combine import combine, combine_into
from mdkern.kernels.backbone.triton_swiglu import swiglu_into
from mdkern.kernels.device import copies_in_bulk
from mdkern.kernels.invariant import is_batch_invariant

MOST_FEW = 64  # rows of an expert on average up to which our products are used, else PyTorch's grouped ones
SORT_BLOCK = 2048
INVARIANT_ROWS = 64  # of a tile in the batch-invariant mode
MOST_GATHERED = 176 << 20  # bytes of gathered rows, with their gates and ups, at a time in grouped products
MOST_OUTPUTS = 128 << 20  # bytes of the experts' outputs at a time there
COLUMNS_UNIT = 256  # columns of a tile of PyTorch's grouped products


class Tiling(NamedTuple):
    """Of a program: columns, numbers of the inner dimension in a step, steps loaded ahead, warps."""

    columns: int
    inner: int
    stages: int
    warps: int


# Three programs and more on a multiprocessor: while one begins or ends, the others read. docs/notes/diffusion-gemma.md
GATED = Tiling(64, 64, 3, 4)
DOWN = Tiling(64, 64, 3, 4)
FLOAT32 = Tiling(64, 32, 2, 4)


@triton.jit
def sort_pairs_kernel(index, order, place, ends, pairs, BLOCK: tl.constexpr):
    """The pairs of one expert, in ascending order, after those of the experts before it; and where each pair is."""
    expert = tl.program_id(0)
    lower = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = tl.load(index + pair, mask=pair < pairs, other=2147483647)
        lower += (chosen < expert).to(tl.int32)
        equal += (chosen == expert).to(tl.int32)
    before = tl.sum(lower, 0)
    tl.store(ends + expert, before + tl.sum(equal, 0))
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = tl.load(index + pair, mask=pair < pairs, other=2147483647)
        own = (chosen == expert).to(tl.int32)
        at = before + tl.cumsum(own, 0) - 1
        tl.store(order + at, pair, mask=own != 0)
        tl.store(place + pair, at.to(tl.int64), mask=own != 0)
        before += tl.sum(own, 0)


@triton.jit(do_not_specialize=["pairs"])
def expert_product_kernel(
    x,  # [N, D], or with GATED False [pairs, F] in sorted order
    weight,  # [E, 2 F, D], or with GATED False [E, D, F]; with `places` one expert's gate [F, D], or its [D, F]
    places,  # [2, E] or [1, E]: how many numbers after `weight` each expert's gate and up begin, or its weight
    order,  # [pairs]: the pairs sorted by expert
    ends,  # [E]: where each expert's pairs end
    out,  # [pairs, F] or [pairs, D] in sorted order
    pairs,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,  # K, experts of a row
    COLUMNS: tl.constexpr,  # of the output
    INNER: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,  # else GELU
    EXPERT_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    tile = tl.program_id(1)  # of all experts' rows
    each = tl.arange(0, EXPERT_BLOCK)
    end = tl.load(ends + each, mask=each < EXPERTS, other=0)
    begin = tl.load(ends + each - 1, mask=(each > 0) & (each < EXPERTS), other=0)
    tiles = (end - begin + BLOCK_ROWS - 1) // BLOCK_ROWS
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    if expert >= EXPERTS:
        return
    own = each == expert
    first = tl.sum(tl.where(own, begin + (tile - upto + tiles) * BLOCK_ROWS, 0), 0)
    last = tl.sum(tl.where(own, end, 0), 0)
    row = first + tl.arange(0, BLOCK_ROWS)
    there = row < last
    source = tl.where(there, row, 0)
    if GATED:
        source = tl.load(order + row, mask=there, other=0) // CHOICES
    inner = tl.arange(0, BLOCK_INNER)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = column < COLUMNS
    some = tl.where(wanted, column, 0)
    read = x + source.to(tl.int64)[:, None] * INNER + inner[None, :]
    HEIGHT: tl.constexpr = COLUMNS * 2 if GATED else COLUMNS
    ALIGNED: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth  # numbers of 16 bytes
    if places is None:
        begins = expert.to(tl.int64) * HEIGHT * INNER
        beside_begins = begins + COLUMNS * INNER
    else:
        begins = tl.multiple_of(tl.load(places + expert), ALIGNED)
        beside_begins = begins
        if GATED:
            beside_begins = tl.multiple_of(tl.load(places + EXPERTS + expert), ALIGNED)
    entry = weight + begins + some.to(tl.int64)[:, None] * INNER + inner[None, :]
    beside_entry = weight + beside_begins + some.to(tl.int64)[:, None] * INNER + inner[None, :]
    product = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
    beside = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
    for k in range(0, INNER, BLOCK_INNER):
        if INNER % BLOCK_INNER == 0:
            rows = tl.load(read + k, mask=there[:, None], other=0.0)
            left = tl.load(entry + k)
        else:
            within = (k + inner < INNER)[None, :]
            rows = tl.load(read + k, mask=there[:, None] & within, other=0.0)
            left = tl.load(entry + k, mask=within, other=0.0)
        product = tl.dot(left, tl.trans(rows), product, input_precision="ieee")
        if GATED:
            if INNER % BLOCK_INNER == 0:
                right = tl.load(beside_entry + k)
            else:
                right = tl.load(beside_entry + k, mask=within, other=0.0)
            beside = tl.dot(right, tl.trans(rows), beside, input_precision="ieee")
    if GATED:
        curved = product
        if not SILU:
            curved = 1.5957691216057308 * (product + 0.044715 * product * product * product)  # 2 sqrt(2 / pi)
        product = product * tl.sigmoid(curved) * beside
    write = out + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(write, tl.trans(product).to(out.dtype.element_ty), mask=there[:, None] & wanted[None, :])


def sort_pairs(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs sorted by expert, stably, where each is in that order, and where those of each expert end.

    int32 ``[pairs]``, int64 of the shape of `index`, and int32 ``[E]``.
    """
    order = torch.empty(index.numel(), dtype=torch.int32, device=index.device)
    place = torch.empty(index.shape, dtype=torch.int64, device=index.device)
    ends = torch.empty(experts, dtype=torch.int32, device=index.device)
    sort_pairs_kernel[(experts,)](index, order, place, ends, index.numel(), BLOCK=SORT_BLOCK, num_warps=8)
    return order, place, ends


def rows_of_a_tile(pairs: int, experts: int) -> int:
    """Half more than an expert has on average, so that most have one tile."""
    if is_batch_invariant():
        return INVARIANT_ROWS
    return min(128, max(16, triton.next_power_of_2(triton.cdiv(3 * pairs, 2 * experts))))


class Product(NamedTuple):
    """A product of every pair's row with its expert's weights."""

    weight: Tensor
    places: Tensor | None
    columns: int
    inner: int
    gated: bool
    silu: bool


def product(x: Tensor, of: Product, order: Tensor, ends: Tensor, choices: int, tiling: Tiling) -> Tensor:
    pairs, experts = len(order), len(ends)
    rows = rows_of_a_tile(pairs, experts)
    out = torch.empty((pairs, of.columns), dtype=x.dtype, device=x.device)
    expert_product_kernel[(triton.cdiv(of.columns, tiling.columns), min(pairs, experts) + pairs // rows)](
        x,
        of.weight,
        of.places,
        order,
        ends,
        out,
        pairs,
        EXPERTS=experts,
        CHOICES=choices,
        COLUMNS=of.columns,
        INNER=of.inner,
        GATED=of.gated,
        SILU=of.silu,
        EXPERT_BLOCK=triton.next_power_of_2(experts),
        BLOCK_ROWS=rows,
        BLOCK=tiling.columns,
        BLOCK_INNER=tiling.inner,
        num_warps=tiling.warps,
        num_stages=min(tiling.stages, 3) if rows > 64 else tiling.stages,  # more would not fit on every GPU
    )
    return out


def grouped(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """The mixture by PyTorch's grouped products, which need the pairs' rows side by side.

    With many pairs this is some of them at a time, and then some columns of the outputs at a time. As pairs are sorted
    by expert, an expert's weights are still read once, or twice where a part ends in the midst of its pairs.
    """
    order, place, ends = sort_pairs(index.contiguous(), len(down))
    gated = gated_in_parts(x, gate_up, order // index.shape[1], ends, activation)
    width = max(1, MOST_OUTPUTS // (len(order) * x.element_size() * COLUMNS_UNIT)) * COLUMNS_UNIT
    out, weights = torch.empty_like(x), weights.contiguous()
    for first in range(0, x.shape[1], width):
        part = slice(first, first + width)
        outputs = F.grouped_mm(gated, down[:, part].transpose(-2, -1), offs=ends)
        combine_into(out[:, part], outputs, place, weights)
        del outputs  # before the next ones are made
    return out


def gated_in_parts(x: Tensor, gate_up: Tensor, source: Tensor, ends: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of the pairs in sorted order, ``[pairs, F]``.

    Args:
        source: int ``[pairs]``, the row of each pair.
        ends: int32 ``[E]``, where the pairs of each expert end.
    """
    pairs, height = len(source), gate_up.shape[1]
    held = pairs * (x.shape[1] + height) * x.element_size()
    size = triton.cdiv(pairs, triton.cdiv(held, MOST_GATHERED))
    ends_within = [ends]
    if size < pairs:
        starts = torch.arange(0, pairs, size, dtype=torch.int32, device=x.device)
        ends_within = (ends - starts[:, None]).clamp_(0, size).unbind()
    gated = x.new_empty(pairs, height // 2)
    for first, ends_of_part in zip(range(0, pairs, size), ends_within):
        part = slice(first, first + size)
        gate, up = F.grouped_mm(x[source[part]], gate_up.transpose(-2, -1), offs=ends_of_part).chunk(2, dim=-1)
        swiglu_into(gated[part], gate, up, activation)
        del gate, up  # before the next rows are gathered
    return gated


def groups_well(x: Tensor, gate_up: Tensor, pairs: int) -> bool:
    """Whether PyTorch has fast grouped products for these, and enough rows for them."""
    experts, height, depth = gate_up.shape
    aligned = depth % 8 == 0 and height % 16 == 0
    enough = pairs > MOST_FEW * experts and not is_batch_invariant()
    return enough and aligned and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and copies_in_bulk(x)


def gated_experts(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """`gated_experts` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if x.dtype == torch.float64:
        return gated_experts_reference(x, index, weights, gate_up, down, activation)
    pairs = index.numel()
    if not pairs or not down.numel():
        return torch.zeros_like(x)
    if groups_well(x, gate_up, pairs):
        return grouped(x.contiguous(), index, weights, gate_up, down, activation)
    _, depth, width = down.shape
    silu = activation == "silu"
    first = Product(gate_up, None, width, depth, True, silu)
    return by_expert(x, index, weights, first, Product(down, None, depth, width, False, silu), len(down))


def listed_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gates: list[Tensor],
    ups: list[Tensor],
    downs: list[Tensor],
    places: Tensor,
    activation: str,
) -> Tensor:
    """`listed_experts` on a GPU (or, on the CPU, in Triton's interpreter)."""
    if x.dtype == torch.float64:
        return listed_experts_reference(x, index, weights, gates, ups, downs, places, activation)
    if not index.numel() or not downs[0].numel():
        return torch.zeros_like(x)
    depth, width = downs[0].shape
    silu = activation == "silu"
    first = Product(gates[0], places, width, depth, True, silu)
    return by_expert(x, index, weights, first, Product(downs[0], places[2:], depth, width, False, silu), len(downs))


def by_expert(x: Tensor, index: Tensor, weights: Tensor, first: Product, second: Product, experts: int) -> Tensor:
    """The mixture by our products."""
    x, choices = x.contiguous(), index.shape[1]
    order, place, ends = sort_pairs(index.contiguous(), experts)
    tilings = (FLOAT32, FLOAT32) if x.dtype == torch.float32 else (GATED, DOWN)
    gated = product(x, first, order, ends, choices, tilings[0])
    outputs = product(gated, second, order, ends, choices, tilings[1])
    return combine(outputs, place, weights.contiguous())
