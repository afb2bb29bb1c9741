"""Explains passes that gave no token: which sample, at which step, and whether the model or a processor caused it."""

from __future__ import annotations

import torch
from torch import Tensor

from mdkern.engine.hooks import guided_hidden, processed
from mdkern.engine.processors import Rows
from mdkern.engine.request import Request
from mdkern.engine.state import SamplerState
from mdkern.plan import positions_in_text


def has_failed(state: SamplerState) -> bool:
    """Whether a pass gave no token since this was last asked. Synchronises; it is called once in a segment."""
    failed = bool(state.failed)
    if failed:
        state.failed.fill_(False)
    return failed


def explain(
    request: Request, name: str, row: int, step: int, ids: Tensor, position: Tensor, time: float
) -> FloatingPointError:
    """The reason why a pass gave no token, found by running it again for this sequence alone.

    Args:
        name: the denoiser's name in the request.
        row: the sequence's place in the request.
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
    states = hidden[0, position]
    reason, at = fault(denoiser.head.logits(states))
    source = model
    if reason is None and request.logits_processor is not None:
        attended = None if mask is None else mask.expand(len(position), -1)
        in_text = position if mask is None else positions_in_text(mask)[0, position]
        rows = Rows(ids.expand(len(position), -1), attended, position, in_text, denoiser.mask_id)
        reason, at = fault(processed(request.logits_processor, denoiser.head, states, rows))
        source = "the logits processor"
    where = f"sample {int(request.sample_ids[row])}, step {step}"
    if reason is None:  # the pass of this sequence alone is in order
        return FloatingPointError(f"{where}: {model} gave NaN or infinite logits, so no token could be drawn")
    where += f", position {int(position[at])}"
    return FloatingPointError(f"{where}: {source} {reason}, so no token could be drawn")


def fault(logits: Tensor) -> tuple[str | None, int]:
    """What is wrong with the first of the rows ``[R, V]`` from which no token can be drawn, or None, and its number."""
    bad = (~logits.logsumexp(-1).isfinite()).nonzero()[:, 0]
    if not len(bad):
        return None, 0
    row = int(bad[0])
    forbidden = bool((logits[row] == -torch.inf).all())
    return "forbade every id (logits of -inf)" if forbidden else "gave NaN or infinite logits", row
