"""Soft inputs in step-by-step decoding: how much of each token of a block the model's next pass reads.

`mdkern.models.soft` says what a model reads then. The shares are those of the last pass's probabilities, and are kept
in `Progress.softness` while their block is decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.engine.progress import Progress, Settings
from mdkern.engine.slots import Slots, places
from mdkern.models import Denoiser


def softened(denoiser: Denoiser, settings: Settings, progress: Progress, sequence: Tensor, column: Tensor) -> Denoiser:
    """The denoiser for a pass over ``sequence [B]``, with soft inputs at ``column [B, R]`` if the decoder wants them.

    Only those of a block that is being decoded are mixtures; all others are tokens.
    """
    if not settings.decoder.soft:
        return denoiser
    return denoiser.softened(progress.softness[sequence].gather(1, column))


def soften(
    settings: Settings, progress: Progress, slots: Slots, new: Tensor, probability: Tensor, over: Tensor
) -> None:
    """Say how sure the model is of its tokens for the next pass; where ``over [B]``, the block's tokens are final."""
    view = slots.view
    unsure = (view.masked | view.revealed) & (new != settings.mask_id) & ~over[:, None]
    rows, length = progress.softness.shape
    target, _ = places(slots, rows, length)
    progress.softness.view(-1)[target] = torch.where(unsure, probability, 1.0)
