"""The middle of `soft_embedding` in Triton: from the logits of some ids to their probabilities, in the table's dtype.

The products before and after it are cuBLAS's.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from mdkern.kernels.triton_common import IMPOSSIBLE, LOG2E, finish_logits


@triton.jit
def soft_weights_kernel(
    logits,  # [M, ids]
    weight_scale,  # [ids] or None
    bias,  # [ids] or None
    logsumexp,  # [M]
    temperature,  # [M], or None: `uniform_temperature` everywhere
    uniform_temperature,
    weights,  # [M, ids]: 2^SHIFT times the probabilities
    ids,  # a multiple of 16 in all parts but the last, or loads and stores are of one number each
    logits_stride,
    weights_stride,
    scale,
    soft_cap,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ids
    x = tl.load(logits + row * logits_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = finish_logits(x[None, :], weight_scale, bias, column, ids, scale, soft_cap, HAS_SCALE, HAS_CAP)
    divisor = uniform_temperature
    if temperature is not None:
        divisor = tl.load(temperature + row)
    slope = LOG2E / tl.where(divisor == 0.0, 1.0, divisor)
    total = tl.load(logsumexp + row)
    p = tl.exp2(x * slope - (total * LOG2E - SHIFT))
    p = tl.where(x > IMPOSSIBLE, p, total * 0.0)  # NaN stays NaN
    tl.store(weights + row * weights_stride + column[None, :], p.to(weights.dtype.element_ty), mask=inside[None, :])
