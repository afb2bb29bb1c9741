"""Shared by the families: prompts with masks after them, refusals, and models under the name `AutoModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdkern.models import Denoiser, adapt


class AutoModel:
    """In the place of transformers' ``AutoModel``, ``AutoModelForCausalLM`` and ``AutoModelForMaskedLM``."""

    @staticmethod
    def from_pretrained(name_or_path: Any, **options: Any) -> Any:
        """The model as transformers returns it, in eval mode, also if its code was written for transformers 4.

        Args:
            name_or_path, options: as in `mdkern.from_pretrained`; ``torch_dtype`` is another name of ``dtype``.
        """
        from mdkern.models.loading import load_checkpoint

        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        return load_checkpoint(name_or_path, **options).module


def denoiser_of(model: Any, mask_id: int | None) -> Denoiser:
    """The model as a denoiser, with this mask id or, if it is None, its own."""
    return model if isinstance(model, Denoiser) and mask_id is None else adapt(model, mask_id=mask_id)


def with_masks(
    denoiser: Denoiser, prompt: Any, attention_mask: Tensor | None, count: int, fill_in: bool
) -> tuple[Tensor, Tensor | None]:
    """The prompts with `count` masks after them, int64 ``[B, P + count]``, and their attention mask, on the device.

    Args:
        prompt: integer ``[B, P]``, padded on the left where prompts are shorter.
        attention_mask: ``[B, P]``, 0 at padding; None: no padding.
        fill_in: whether masks in the prompt are filled in, too. Otherwise they are refused.
    """
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or prompt.is_floating_point():
        kind = f"{prompt.dtype} {tuple(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
        raise ValueError(f"the prompt must be an integer tensor [B, P], as a tokenizer returns it, not {kind}")
    ids = prompt.to(denoiser.device, torch.int64)
    if attention_mask is not None:
        if tuple(attention_mask.shape) != tuple(ids.shape):
            raise ValueError(f"attention_mask must be [B, P] = {tuple(ids.shape)}, not {tuple(attention_mask.shape)}")
        attention_mask = torch.nn.functional.pad(attention_mask.to(denoiser.device), (0, count), value=1)
    masked = ids == denoiser.mask_id
    if attention_mask is not None:
        masked &= attention_mask[:, : ids.shape[1]] != 0
    if not fill_in and bool(masked.any()):
        raise ValueError(
            f"the prompt has the mask id {denoiser.mask_id} in it, which this loop does not fill in: call"
            " mdkern.sample(model, input_ids=...) to fill masks in, or, if it is padding, give the attention_mask"
        )
    return torch.nn.functional.pad(ids, (0, count), value=denoiser.mask_id), attention_mask


def check_blocks(gen_length: int, block_length: int, steps: int) -> None:
    """Refuse blocks that do not divide the text, and steps that do not divide among the blocks."""
    for name, value in (("gen_length", gen_length), ("block_length", block_length), ("steps", steps)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if gen_length % block_length:
        raise ValueError(f"gen_length must be a multiple of block_length={block_length}, not {gen_length}")
    if steps % (gen_length // block_length):
        raise ValueError(f"steps must be a multiple of the {gen_length // block_length} blocks, not {steps}")


def refuse(reasons: dict[str, str], given: dict[str, Any]) -> None:
    """Refuse arguments that cannot be served, with the reason for each."""
    for name, reason in reasons.items():
        if given.get(name) not in (None, False):
            raise ValueError(f"{name} is not served here: {reason}")
