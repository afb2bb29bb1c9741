"""MDLM's samplers as its code runs them: every step is a full forward pass, and all logits are in memory.

They serve the tests, which compare `mdkern.sample` with them, and timing side by side. Sahoo et al. (2406.07524) and
their public code draw from a float32 categorical, ``argmax(weight / (1e-10 - log(u + 1e-10)))``, over V + 1 weights for
each position, of which the last stands for staying masked. `ddpm_cache` keeps the probabilities while nothing in the
batch changes.

In float32 this is not exact: ``-log(u)`` of a 24-bit u is never below 2^-24, so a token whose weight is below 2^-24 of
the mask's, that is, whose probability is below about ``2^-24 T s``, is hardly ever drawn. This cuts off the tail of the
distribution, and the text comes out more probable than it should (Zheng et al., 2409.02908, found the same for Gumbel
noise). ``dtype=torch.float64`` draws exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdkern.engine.checks import check_count
from mdkern.engine.resolve import resolve_input, resolve_seed
from mdkern.engine.resolve_models import resolve_models
from mdkern.schedule import Schedule


def categorical(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Index drawn with probability proportional to ``weights [..., V]``, by the exponential race in their dtype."""
    uniform = torch.rand(weights.shape, generator=generator, device=weights.device, dtype=weights.dtype)
    return (weights / (1e-10 - (uniform + 1e-10).log())).argmax(-1)


@torch.no_grad()
def ddpm(
    heavy: Any,
    light: Any = None,
    schedule: str | Schedule | None = None,
    *,
    input_ids: Tensor | None = None,
    num_samples: int | None = None,
    length: int | None = None,
    steps: int,
    seed: int | None = None,
    eps: float = 1e-5,
    cache: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, int]]:
    """MDLM's ancestral sampler over one batch.

    Args:
        heavy, light, schedule, input_ids, num_samples, length, steps, seed: as in `mdkern.sample`.
        eps: the time at which the steps end; a closing pass takes the most probable token at positions still masked.
        dtype: dtype of the categorical: float32 as in MDLM's code, float64 for exact draws.
        cache: keep the probabilities while the whole batch is unchanged. Refused with time conditioning.

    Returns:
        sequences int64 ``[N, L]``, and the forward passes of the batch by denoiser.
    """
    denoisers, plan = resolve_models(heavy, light, schedule)
    segments = plan.segments(check_count("steps", steps))
    if cache and any(denoiser.time_conditioning for denoiser in denoisers.values()):
        raise ValueError("cache=True needs denoisers without time conditioning: their output changes with every step")
    first = next(iter(denoisers.values()))
    ids, _ = resolve_input(first, input_ids, None, num_samples, length)
    generator = torch.Generator(ids.device).manual_seed(resolve_seed(seed, None))
    times = torch.linspace(1.0, eps, steps + 1, device=ids.device)
    passes = dict.fromkeys(denoisers, 0)
    probability: Tensor | None = None
    running = ""
    for segment in segments:
        denoiser = denoisers[segment.model]
        for step in range(segment.first, segment.stop):
            if probability is None or not cache or running != segment.model:
                t = times[step].expand(ids.shape[0])
                probability = denoiser.logits(ids, t).softmax(-1, dtype=dtype)
                passes[segment.model] += 1
                running = segment.model
            weights = torch.cat(
                (probability * (times[step] - times[step + 1]), times[step + 1].to(dtype).expand(*ids.shape, 1)), dim=-1
            )
            drawn = categorical(weights, generator)
            drawn = torch.where(drawn == probability.shape[-1], first.mask_id, drawn)
            updated = torch.where(ids == first.mask_id, drawn, ids)
            if not torch.equal(updated, ids):
                probability = None
            ids = updated
    closing = denoisers[segments[-1].model]
    passes[segments[-1].model] += 1
    greedy = closing.logits(ids, times[-1].expand(ids.shape[0])).argmax(-1)
    return torch.where(ids == first.mask_id, greedy, ids), passes


def ddpm_cache(*arguments: Any, **options: Any) -> tuple[Tensor, dict[str, int]]:
    """`ddpm` with ``cache=True``: MDLM's default for denoisers without time conditioning."""
    return ddpm(*arguments, **options, cache=True)
