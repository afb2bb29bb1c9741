"""What the kernels that round their results to e4m3 share."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from mdkern.kernels.backbone.quantise import LARGEST, SMALLEST_SCALE

MOST = tl.constexpr(LARGEST)
LEAST = tl.constexpr(SMALLEST_SCALE * LARGEST)


@triton.jit
def scale_and_inverse(x, AXIS: tl.constexpr):
    """The scales of `quantise_rows` along an axis, and what numbers are multiplied by to be divided by them."""
    most = tl.maximum(tl.max(tl.abs(x), AXIS), LEAST)
    return most * (1.0 / MOST), tl.div_rn(MOST, most)
