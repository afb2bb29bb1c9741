"""A process's part of a vocabulary that is divided over processes, and what the processes exchange of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from mdkern.ranks import Ranks

# Its name in PyTorch, newer versions first.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """The ids ``first <= id < stop`` of a vocabulary whose other ids the other processes of a group have."""

    first: int
    stop: int
    group: Any  # the process group, whose ranks have the parts in order
    ranks: Ranks  # the same processes, to agree on calls

    @property
    def count(self) -> int:
        return self.ranks.count

    def gather(self, values: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, stacked in order. On a GPU it can be captured in a CUDA graph."""
        gathered = values.new_empty((self.count, *values.shape))
        ALL_GATHER(gathered.flatten(0, 1), values.contiguous(), group=self.group)
        return gathered

    def joined(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary, ``[..., V]``, from each process's ``[..., V of the shard]``."""
        widths = self.gather(torch.tensor([self.stop - self.first], device=logits.device)).flatten().tolist()
        padded = torch.nn.functional.pad(logits, (0, max(widths) - logits.shape[-1]))
        parts = self.gather(padded.flatten(0, -2) if padded.ndim > 1 else padded[None])
        whole = torch.cat([part[:, :width] for part, width in zip(parts, widths)], dim=-1)
        return whole.view(*logits.shape[:-1], sum(widths))
