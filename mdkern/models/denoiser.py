"""What the sampler needs of a model: a backbone (ids -> hidden states) and a head (hidden rows -> vocabulary)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mdkern.kernels.reference import finish_logits


def available_device(device: torch.device | str) -> torch.device:
    """`device`, refused if it is a GPU that is not there."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known: {str(error).splitlines()[0]}") from error
    found = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= found:
        raise ValueError(f"device {chosen} was asked for, but the GPUs that PyTorch finds here are {found}")
    return chosen


@dataclass(frozen=True)
class Head:
    """The output layer as data: ``logits = cap(scale * hidden @ weight.T) + bias``, ``cap(x) = c * tanh(x / c)``.

    The ids that may never be produced (the mask, padded ids) are those whose bias is ``-inf``: one mechanism for all
    of them, at the price of the addition that a bias costs anyway.
    """

    weight: Tensor | None  # [V, D] floating; None: the "hidden" rows are logits already
    bias: Tensor  # [V] float32
    scale: float = 1.0
    soft_cap: float = 0.0  # 0: none

    @property
    def padded_vocab_size(self) -> int:
        return self.bias.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits, float32 ``[..., V]``. For the baselines, tests and training; the sampler never calls it."""
        logits = hidden if self.weight is None else torch.nn.functional.linear(hidden, self.weight)
        return finish_logits(logits, self.bias, self.scale, self.soft_cap)


class Denoiser:
    """A masked diffusion language model, split where the sampler needs it split.

    Subclasses set the attributes and implement `hidden`; `mdkern.adapt` builds them from people's models.
    """

    name: str = "denoiser"
    vocab_size: int  # ids in 0..vocab_size-1, the mask id included if it lies there
    mask_id: int
    eos_id: int | None = None
    max_length: int | None = None  # positions; None: no limit
    num_blocks: int | None = None  # B of the paper's equation (3)
    time_conditioning: bool = False
    takes_attention_mask: bool = True  # whether sequences may be padded
    device: torch.device
    dtype: torch.dtype
    head: Head

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The head's input at every position, or only at `positions`.

        Args:
            input_ids: int64 ``[B, L]``, mask id where not yet revealed.
            t: float32 ``[B]``, diffusion time in (0, 1]; read only if ``time_conditioning``.
            positions: int64 ``[B, R]``: the positions of each sequence whose hidden states are wanted. Grouped by
                sequence because attention is: keys and values of a sequence are read once for all its rows.
            attention_mask: bool ``[B, L]``, False at padding; None: no padding anywhere.

        Returns:
            ``[B, L, D]`` or ``[B, R, D]``.
        """
        raise NotImplementedError

    def logits(self, input_ids: Tensor, t: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """float32 ``[B, L, V]`` with V the padded vocabulary: every logit of every position, as the baselines want."""
        return self.head.logits(self.hidden(input_ids, t, None, attention_mask))

    def flops(self, length: int, rows: int) -> int | None:
        """Floating-point operations of one forward pass of one sequence with `rows` head rows, None if unknown."""
        return None

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors to be checked for NaN before sampling starts."""
        if self.head.weight is not None:
            yield "head.weight", self.head.weight
