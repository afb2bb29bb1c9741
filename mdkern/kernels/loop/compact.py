"""`compact`: the indices of a mask's True entries, and their number, without asking the host how many there are.

What `torch.nonzero` does with a synchronisation; the `row_index` and `row_count` of `vocab_projection`. The contract,
and plain PyTorch; `triton_compact` runs it on a GPU, in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.kernels.device import has_triton


def reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`compact` in plain PyTorch, without a synchronisation too: the n-th True entry is the first with n up to it."""
    if mask.numel() == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=mask.device)
        return nothing, nothing.sum()
    number = mask.flatten().cumsum(0)  # of True entries, up to each
    place = torch.arange(1, len(number) + 1, device=mask.device)
    count = mask.sum()
    return torch.searchsorted(number, place).masked_fill(place > count, 0), count


@torch.library.custom_op("mdkern::compact", mutates_args=())
def _compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    return reference(mask)


@_compact.register_kernel("cuda")
def _on_gpu(mask: Tensor) -> tuple[Tensor, Tensor]:
    if not has_triton(mask.device) or mask.numel() == 0:
        return reference(mask)
    from mdkern.kernels.loop import triton_compact  # imports Triton, which is no business of a machine without a GPU

    return triton_compact.compact(mask)


@_compact.register_fake
def _fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    row = torch.empty(mask.numel(), dtype=torch.int64, device=mask.device)
    return row, row.new_empty(())


def compact(
    mask: Tensor,  # [B, R]
) -> tuple[Tensor, Tensor]:
    """The indices of the True entries of a mask, ascending, in a tensor whose size does not depend on their number.

    Args:
        mask: bool ``[B, R]``, or of any other shape; fewer than 2^31 entries.

    Returns:
        row int64 ``[B*R]``: indices into the flattened mask, 0 from `count` on; and count int64 ``[]``.

    Raises:
        ValueError: a mask that is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}")
    return _compact(mask)
