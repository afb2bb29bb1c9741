"""Passes that gave no token: which sample, at which step, and whether the model or a logits processor is the reason."""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.engine.hooks import guided_hidden, process
from mdkern.engine.request import Request
from mdkern.engine.state import SamplerState


def has_failed(state: SamplerState) -> bool:
    """Whether a pass gave no token, told once: a segment's one synchronisation."""
    failed = bool(state.failed)
    if failed:
        state.failed.fill_(False)
    return failed


def explain(request: Request, name: str, row: int, step: int, ids: Tensor, position: Tensor, time: float) -> str:
    """A sentence on a failure, found by running its pass again, alone.

    Args:
        name: of the denoiser in the request.
        row: of the request's sequences.
        ids: int64 ``[L]``, the sequence before the step.
        position: int64 ``[R]``, where tokens were wanted.
        time: diffusion time of the pass.
    """
    denoiser = request.denoisers[name]
    model = denoiser.name if len(request.denoisers) == 1 else f"{denoiser.name} (model {name})"
    mask = None if request.attention_mask is None else request.attention_mask[row : row + 1]
    t = torch.tensor([time], dtype=torch.float32, device=ids.device) if denoiser.time_conditioning else None
    given = ~request.masked[row : row + 1]
    hidden = guided_hidden(denoiser, request.guidance_scale, ids[None], given, t, None, mask)
    logits = denoiser.head.logits(hidden)[0, position]
    reason, at = fault(logits)
    source = model
    if reason is None and request.logits_processor is not None:
        rows = ids.expand(len(position), -1)
        reason, at = fault(process(request.logits_processor, rows, logits, denoiser.mask_id))
        source = "the logits processor"
    if reason is None:  # not to be seen again in a pass of its own
        return f"sample {int(request.sample_ids[row])}, step {step}: {model} gave NaN or infinite logits"
    return f"sample {int(request.sample_ids[row])}, step {step}, position {int(position[at])}: {source} {reason}"


def fault(logits: Tensor) -> tuple[str | None, int]:
    """What is wrong with the first of rows ``[R, V]`` that no token can be drawn from, and which row; None: nothing."""
    bad = (~logits.logsumexp(-1).isfinite()).nonzero()[:, 0]
    if not len(bad):
        return None, 0
    row = int(bad[0])
    forbidden = bool((logits[row] == -torch.inf).all())
    return "forbade every id (logits of -inf)" if forbidden else "gave NaN or infinite logits", row
