"""Refuses `batch_invariant=True` where a sample's bits would depend on the rest of the batch all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders import Decoder
from mdkern.kernels.device import has_triton
from mdkern.models import Denoiser

DTYPES = torch.bfloat16, torch.float16, torch.float32


def check_batch_invariant(
    denoisers: Mapping[str, Denoiser], decoder: Decoder, router: Any, length: int, attention_mask: Tensor | None
) -> None:
    """Refuse a call of which not every sum is known to have an order of its own.

    Raises:
        ValueError: no GPU with Triton; padding before the text; a model that runs by its own forward; a router or
            decoder that adds up numbers over a text in floating point.
    """
    first = next(iter(denoisers.values()))
    if not has_triton(first.device):
        raise ValueError(
            f"batch_invariant needs a GPU on which Triton's kernels run, not {first.device}: the libraries of CPUs"
            " choose the order of their sums by the number of rows"
        )
    for name, denoiser in denoisers.items():
        if denoiser.dtype not in DTYPES:
            raise ValueError(f"batch_invariant is for 16 and 32 bits: model {name} is of {denoiser.dtype}")
        reason = denoiser.why_not_invariant(length, attention_mask)
        if reason:
            raise ValueError(f"batch_invariant must be False with model {name}: {reason}")
    if attention_mask is not None and bool((attention_mask[:, 1:] & ~attention_mask[:, :-1]).any()):
        raise ValueError(
            "batch_invariant needs padding after the text only, as the columns of a text must not depend on the"
            " longest one: pad on the right (tokenizer.padding_side = 'right')"
        )
    if router is not None:
        raise ValueError(
            f"batch_invariant must be False with {type(router).__name__}: it adds up numbers over each text, in an"
            " order that depends on the longest one"
        )
    if not decoder.batch_invariant:
        raise ValueError(
            f"batch_invariant must be False with {type(decoder).__name__}: it adds up numbers over each text or batch,"
            " in an order that depends on their size"
        )
