"""`joint_linear`, `joint_swiglu`: products of the same rows with several weights in one launch; `joint_parts`.

The weights are tensors of their own and are read where they are, so that no packed copy of them is needed. The
activation of a Llama's MLP (Shazeer, 2002.05202) is done with the product in `joint_swiglu`. `joint_parts` leaves the
last sum of a product that is divided among programs to the `rms_norm` that reads it. This file has the
contracts and the references in plain PyTorch; `triton_skinny` has the GPU kernel for a few rows, `hopper_joint` that
for more. Measurements: docs/notes/llama.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkern.kernels.backbone.joint_tiles import BLOCK, IN_PARTS, MOST_ROWS, pays, pays_in_parts
from mdkern.kernels.backbone.modulated_norm import wide
from mdkern.kernels.backbone.skinny import MOST_ROWS as FEW_ROWS
from mdkern.kernels.backbone.skinny import SPLITS, check_divided, check_layer, runs_skinny, skinny_parts_reference
from mdkern.kernels.backbone.swiglu import swiglu_reference
from mdkern.kernels.device import copies_in_bulk, is_hopper, num_sms
from mdkern.kernels.invariant import rows_to_choose_by
from mdkern.kernels.operator import operator

FAR = 1 << 40  # bytes
INNER = 64  # numbers of the inner dimension in a step


def joint_linear_reference(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    third_bias: Tensor | None,
) -> Tensor:
    """`joint_linear` in plain PyTorch."""
    layers = (first, first_bias), (second, second_bias), (third, third_bias)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in layers if weight is not None], 1)


def joint_swiglu_reference(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None
) -> Tensor:
    """`joint_swiglu` in plain PyTorch."""
    rows = x.to(wide(x))
    first, second = (
        F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        for weight, bias in ((gate, gate_bias), (up, up_bias))
    )
    return swiglu_reference(first, second).to(x.dtype)


def joint_parts_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `joint_parts` takes the first rows of, in plain PyTorch."""
    parts = skinny_parts_reference(x, weight, bias).to(x.dtype)
    return F.pad(parts, (0, 0, 0, whole_tiles(x) - len(x)))


def new_joint_parts(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(SPLITS, whole_tiles(x), len(weight))


def whole_tiles(x: Tensor) -> int:
    """Rows of the tiles that have all rows."""
    return -(-len(x) // IN_PARTS.rows) * IN_PARTS.rows


def new_linear(x: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], sum(len(weight) for weight in (first, second, third) if weight is not None))


def new_swiglu(x: Tensor, gate: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], len(gate))


KERNELS = "mdkern.kernels.backbone.launch_joint"
joint_linear_operator = operator(joint_linear_reference, new_linear, f"{KERNELS}:joint_linear", name="joint_linear")
joint_swiglu_operator = operator(joint_swiglu_reference, new_swiglu, f"{KERNELS}:joint_swiglu", name="joint_swiglu")
joint_parts_operator = operator(joint_parts_reference, new_joint_parts, f"{KERNELS}:joint_parts", name="joint_parts")


def runs_joint_linear(x: Tensor, *weights: Tensor) -> bool:
    """Whether one launch is the fast way for these products, on the card that it was measured on."""
    return runs_skinny(x, *weights) or (len(weights) > 1 and fits(x, *weights) and is_fast(x, weights, False))


def runs_joint_swiglu(x: Tensor, gate: Tensor, up: Tensor) -> bool:
    """Whether one launch is the fast way for gate, up and their activation, on the card that it was measured on."""
    pair = gate, up
    return runs_skinny(x, *pair) or (fits(x, *pair) and is_near(*pair) and is_fast(x, pair, True))


def runs_joint_parts(x: Tensor, weight: Tensor) -> bool:
    """Whether the product in parts is the fast way, in a pass of which `runs_early` is true."""
    divides = x.shape[1] % (SPLITS * INNER) == 0
    return divides and runs_early(x.shape[0], len(weight), x.device) and fits(x, weight)


def runs_early(rows: int, width: int, device: torch.device) -> bool:
    """Whether a pass over a residual stream ``[rows, width]`` is faster with its products launched before the kernels
    before them have ended, those back to the stream in parts, on the card that it was measured on.

    Early launches by themselves gained nothing there (docs/notes/llama.md).
    """
    return is_hopper(device) and pays_in_parts(rows_to_choose_by(rows), width, SPLITS, num_sms(device))


def is_fast(x: Tensor, weights: Sequence[Tensor], gated: bool) -> bool:
    """Whether the kernel for more than a few rows is faster than cuBLAS."""
    rows = rows_to_choose_by(x.shape[0])
    known = is_hopper(x.device) and FEW_ROWS < rows <= MOST_ROWS
    return known and pays(rows, sum(map(len, weights)), num_sms(x.device), gated)


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernel for more than a few rows can run products."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and all(
            matrix.is_contiguous() and copies_in_bulk(matrix) and matrix.shape[0] % BLOCK == 0 for matrix in weights
        )
        and copies_in_bulk(x)
    )


def is_near(gate: Tensor, up: Tensor) -> bool:
    """Whether that kernel can read the two as one tensor, which has no strides longer than this."""
    return 0 < abs(gate.data_ptr() - up.data_ptr()) < FAR


def joint_linear(
    x: Tensor,  # [N, K]
    *layers: tuple[Tensor, Tensor | None],  # weight [C, K] and bias [C]
) -> tuple[Tensor, ...]:
    """``x @ weight.T + bias`` of each of one to three layers.

    Args:
        x: floating ``[N, K]``.
        layers: of the dtype of `x`.

    Returns:
        ``[N, C]`` of each layer, columns of one tensor.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if not 1 <= len(layers) <= 3:
        raise ValueError(f"one to three layers can be run at once, not {len(layers)}")
    for weight, bias in layers:
        check_layer(x, weight, bias)
    weights, biases = zip(*layers)
    missing = (None,) * (3 - len(layers))
    product: Tensor = joint_linear_operator(x, *weights, *missing, *biases, *missing)
    return product.split([len(weight) for weight in weights], 1)


def joint_swiglu(
    x: Tensor,  # [N, K]
    gate: tuple[Tensor, Tensor | None],  # weight [F, K] and bias [F]
    up: tuple[Tensor, Tensor | None],
) -> Tensor:
    """``silu(gate(x)) * up(x)`` of two layers. The products are not rounded before they are multiplied.

    Args:
        x: floating ``[N, K]``.
        gate, up: of the dtype of `x`.

    Returns:
        ``[N, F]`` of the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_layer(x, *gate)
    check_layer(x, *up)
    if gate[0].shape != up[0].shape:
        raise ValueError(f"gate and up must be of one shape, not {list(gate[0].shape)} and {list(up[0].shape)}")
    product: Tensor = joint_swiglu_operator(x, gate[0], up[0], gate[1], up[1])
    return product


def joint_parts(
    x: Tensor,  # [N, K]
    weight: Tensor,  # [C, K]
    bias: Tensor | None = None,  # [C]
) -> Tensor:
    """`skinny_parts` of more rows, with each part rounded to the dtype of `x`.

    Returns:
        ``[SPLITS, N, C]`` of the dtype of `x`, the rows of a part together.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_layer(x, weight, bias)
    check_divided(x)
    parts: Tensor = joint_parts_operator(x, weight, bias)
    return parts[:, : len(x)]
