"""What the kernels that round their results to e4m3 share."""

# mypy: ignore-errors

import triton
import triton.language as tl

from mdkern.kernels.backbone.quantise import LARGEST, SMALLEST_SCALE

MOST = tl.constexpr(LARGEST)
LEAST = tl.constexpr(SMALLEST_SCALE * LARGEST)


@triton.jit
def scale_and_inverse(most):
    """The scale of `quantise_rows` for numbers of up to this size, and what they are multiplied by to be divided by it.

    The conversion to e4m3 keeps what rounding has made larger than 448 in its range, and NaN as it is.
    """
    most = tl.maximum(most, LEAST)
    return most * (1.0 / MOST), tl.div_rn(MOST, most)
