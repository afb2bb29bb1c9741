"""The heavy and the light denoiser that ship with the package, and their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mdkern.models import DiT
from mdkern.models.denoiser import available_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent


class Pair(NamedTuple):
    """Two denoisers with one tokenizer."""

    heavy: DiT
    light: DiT
    tokenizer: PreTrainedTokenizerFast


def load_pair(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pair:
    """The shipped pair: 12 and 4 blocks of width 192, 256 positions, trained on public-domain English prose.

    Args:
        device: where to put the models. Default: the GPU if there is one, else the CPU.
        dtype: floating dtype. Default: bfloat16 on a GPU, float32 on the CPU.

    Returns:
        ``(heavy, light, tokenizer)``. Nothing is downloaded.

    Raises:
        ValueError: a GPU asked for where there is none.
    """
    from transformers import PreTrainedTokenizerFast

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = available_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype such as torch.bfloat16, not {dtype!r}")
    heavy, light = (DiT.from_pretrained(FOLDER / name, dtype, chosen) for name in ("heavy", "light"))
    return Pair(heavy, light, PreTrainedTokenizerFast.from_pretrained(FOLDER / "tokenizer"))
