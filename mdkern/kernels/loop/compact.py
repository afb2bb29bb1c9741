"""`compact`: the indices of a mask's True entries and their number, without a synchronisation with the host.

`torch.nonzero` needs one, because the size of its result depends on the values. The results here are the `row_index`
and `row_count` of `vocab_projection`. This file has the contract and the reference in plain PyTorch; `triton_compact`
is the GPU kernel, one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.checks import check_tensor
from mdkern.kernels.operator import operator

MOST_ENTRIES = 1 << 30  # the kernel counts in int32


def compact_reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`compact` in plain PyTorch: the n-th True entry is the first index up to which n entries are True."""
    if mask.numel() == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=mask.device)
        return nothing, nothing.sum()
    number = mask.flatten().cumsum(0)  # True entries up to and including each
    place = torch.arange(1, len(number) + 1, device=mask.device)
    count = mask.sum()
    return torch.searchsorted(number, place).masked_fill(place > count, 0), count


def compact_outputs(mask: Tensor) -> tuple[Tensor, Tensor]:
    row = torch.empty(mask.numel(), dtype=torch.int64, device=mask.device)
    return row, row.new_empty(())


compact_operator = operator(
    compact_reference, compact_outputs, "mdkern.kernels.loop.triton_compact:compact", name="compact"
)


def compact(
    mask: Tensor,  # [B, R]
) -> tuple[Tensor, Tensor]:
    """The indices of the True entries of a mask, ascending, in a tensor whose size does not depend on their number.

    Args:
        mask: bool ``[B, R]``, or of any other shape; at most 2^30 entries.

    Returns:
        row int64 ``[B*R]``: indices into the flattened mask, 0 from `count` on; and count int64 ``[]``.

    Raises:
        ValueError: a mask that is not bool, or has too many entries.
    """
    check_tensor("mask", mask, mask.shape, torch.bool, mask.device)
    if mask.numel() > MOST_ENTRIES:
        raise ValueError(f"mask must have at most 2^30 entries, not {list(mask.shape)}: take a smaller batch size")
    row, count = compact_operator(mask)
    return row, count
