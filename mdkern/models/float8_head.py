"""An output layer in 8 bits: ``mdkern.adapt(model, head_precision="fp8")``.

With few rows the output layer takes as long as reading its weight, so half of the bytes are half of the time. Each row
of the weight is rounded to e4m3 with a scale of its own (`mdkern.kernels.backbone.quantise`); the hidden states stay as
they are, and sums are in float32. So a row's token is the same beside any number of others, and statistics are those of
the rounded weight. What rounding changes: docs/notes/output-layer.md.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from mdkern.kernels.backbone.quantise import FP8, quantise_rows
from mdkern.models.around import AroundDenoiser
from mdkern.models.denoiser import QUANTISED_HEADS, Denoiser, Head, Live

PART = 1 << 15  # ids whose rows are rounded at a time, which bounds what it takes besides the result


class Float8HeadDenoiser(AroundDenoiser):
    """A denoiser with another one's output layer in e4m3.

    The copy is made from the weight as it is at the beginning of each call of `sample`, at the same addresses. The
    weight itself stays, and with it an embedding that is tied to it.
    """

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.head_precision = "fp8"
        head = checked(inner)
        assert head.weight is not None
        mebibytes = (head.weight.numel() + 4 * len(head.weight)) / 2**20
        self.description = f"{inner.description}, its output layer in e4m3 (fp8), which takes {mebibytes:.1f} MiB more"

    head = Live(lambda self: in_float8(self.model, checked(self.inner)))

    def mark(self) -> Hashable:
        return tuple((part.data_ptr(), tuple(part.shape)) for part in (self.head.weight, self.head.weight_scale))

    def current(self) -> Self:
        now = super().current()
        now.head = type(now).head.make(now)
        return now

    def why_not_invariant(self, length: int, attention_mask: Tensor | None) -> str:
        return self.inner.why_not_invariant(length, attention_mask)


def with_head_precision(denoiser: Denoiser, head_precision: str) -> Denoiser:
    """The denoiser with its output layer in this precision, see `mdkern.adapt`."""
    rounded = denoiser.head_precision is not None
    if head_precision == "fp8":
        return denoiser if rounded else Float8HeadDenoiser(denoiser)
    if rounded:
        raise ValueError(
            f"head_precision={head_precision!r} must be given where the model is adapted: this Denoiser has an output"
            " layer in e4m3"
        )
    return denoiser


def checked(denoiser: Denoiser) -> Head:
    """The denoiser's head, refused if it can't be rounded.

    Raises:
        ValueError: there is no output layer apart from the model, it is divided already, or its dtype can't be rounded.
    """
    head, what = denoiser.head, f"head_precision='fp8' is not for {denoiser.name}"
    if head.weight is None:
        raise ValueError(f"{what}, which {denoiser.description}: it needs an output layer that mdkern runs")
    if head.shard is not None:
        raise ValueError(f"{what}, whose vocabulary is divided: give shard_head the model with head_precision='fp8'")
    if head.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{what}: its output layer is of {head.weight.dtype}, and 16 or 32 floating bits are needed")
    return head


def in_float8(model: object, head: Head) -> Head:
    """A head with its weight rounded to e4m3, at the same addresses whenever it is called for a model."""
    weight = head.weight
    assert weight is not None
    kept: tuple[Tensor, Tensor] | None = QUANTISED_HEADS.get(model)
    if kept is None or kept[0].shape != weight.shape or kept[0].device != weight.device:
        with torch.inference_mode(False):  # later calls may be outside of inference mode
            kept = torch.empty_like(weight, dtype=FP8), weight.new_empty(len(weight), dtype=torch.float32)
        QUANTISED_HEADS[model] = kept
    with torch.no_grad():
        for first in range(0, len(weight), PART):
            part = slice(first, first + PART)
            for room, value in zip(kept, quantise_rows(weight[part])):
                room[part].copy_(value)
    return replace(head, weight=kept[0], weight_scale=kept[1])
