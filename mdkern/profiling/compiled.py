"""The ancestral sampler as a good engineer writes it today: `torch.compile`, padded vocabulary, fused sampling.

Every step runs the backbone and the head at every position, as in `mdkern.profiling.eager.ddpm`, but the backbone is
compiled, the vocabulary is padded to a size for which cuBLAS is fast, and one compiled function turns logits into
tokens. It reveals a position with probability (t - s) / t and draws the token by Gumbel-max. This has the distribution
of MDLM's categorical over V + 1 weights, and needs no probabilities in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from mdkern.engine.checks import check_count
from mdkern.engine.resolve import resolve_input, resolve_seed
from mdkern.engine.resolve_models import resolve_models
from mdkern.kernels.device import HOPPER_ATTENTION, capability
from mdkern.models import Denoiser, adapt
from mdkern.models.denoiser import Head
from mdkern.schedule import Schedule


class Wrapped(Denoiser):
    """A denoiser that forwards to another one; the base of those that change one thing."""

    def __init__(self, inner: Denoiser) -> None:
        for field in Denoiser.__annotations__:
            setattr(self, field, getattr(inner, field))
        self.takes_soft = False
        self.inner = inner

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return self.inner.hidden(input_ids, t, positions, attention_mask)

    def flops(self, length: int, rows: int) -> int | None:
        return self.inner.flops(length, rows)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.inner.named_weights()


def plain_hidden(denoiser: Denoiser) -> Callable[..., Tensor]:
    """The backbone in PyTorch's own operations. For a `DiT`, mdkern's kernels are avoided: this is for baselines."""
    hidden: Callable[..., Tensor] = getattr(getattr(denoiser, "model", None), "plain_hidden", denoiser.hidden)
    return hidden


class Compiled(Wrapped):
    """A denoiser whose backbone is compiled, for `ddpm_compiled`."""

    def __init__(self, model: Any, backend: str = "inductor", mode: str | None = None) -> None:
        """`mode` as in `torch.compile`; ``"max-autotune-no-cudagraphs"`` also tunes the matrix products."""
        super().__init__(adapt(model))
        self.compiled = torch.compile(plain_hidden(self.inner), dynamic=False, backend=backend, mode=mode)

    def hidden(
        self,
        input_ids: Tensor,
        t: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if self.device.type != "cuda" or capability(self.device) < 9:
            return self.compiled(input_ids, t, positions, attention_mask)
        with sdpa_kernel(HOPPER_ATTENTION, set_priority=True):  # the DiT's own choice has no effect in compiled code
            return self.compiled(input_ids, t, positions, attention_mask)


def reveal(hidden: Tensor, head: Head, ids: Tensor, mask_id: int, probability: Tensor) -> Tensor:
    """One step after the backbone: ``ids [B, L]`` with each masked position revealed with `probability` (a scalar)."""
    logits = head.logits(hidden)
    token = (logits - (-torch.rand_like(logits).log()).log()).argmax(-1)
    chosen = (ids == mask_id) & (torch.rand(ids.shape, device=ids.device) < probability)
    return torch.where(chosen, token, ids)


def close(hidden: Tensor, head: Head, ids: Tensor, mask_id: int) -> Tensor:
    """The closing pass: masked positions take the most probable token."""
    return torch.where(ids == mask_id, head.logits(hidden).argmax(-1), ids)


@cache
def compiled_function(function: Callable[..., Tensor], backend: str, mode: str | None) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(function, dynamic=False, backend=backend, mode=mode)
    return compiled


@torch.no_grad()
def ddpm_compiled(
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
    backend: str = "inductor",
    mode: str | None = None,
) -> tuple[Tensor, dict[str, int]]:
    """The compiled baseline over one batch.

    Args:
        heavy, light, schedule, input_ids, num_samples, length, steps, eps: as in `eager.ddpm`. Wrap models in
            `Compiled`, or their backbones run eagerly. The vocabulary of a `DiT` is padded to a multiple of 128.
        seed: for PyTorch's own generator, from which compiled code draws; its state is restored afterwards.
        backend, mode: for `torch.compile` of head and sampling.

    Returns:
        sequences int64 ``[N, L]``, and the forward passes of the batch by denoiser.
    """
    denoisers, plan = resolve_models(heavy, light, schedule)
    segments = plan.segments(check_count("steps", steps))
    first = next(iter(denoisers.values()))
    ids, _ = resolve_input(first, input_ids, None, num_samples, length)
    times = torch.linspace(1.0, eps, steps + 1, device=ids.device)
    probability = (times[:-1] - times[1:]) / times[:-1]
    passes = dict.fromkeys(denoisers, 0)
    step_function, closing_function = (compiled_function(f, backend, mode) for f in (reveal, close))
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(resolve_seed(seed, None))
        for segment in segments:
            denoiser = denoisers[segment.model]
            for step in range(segment.first, segment.stop):
                hidden = denoiser.hidden(ids, times[step].expand(len(ids)))
                ids = step_function(hidden, denoiser.head, ids, first.mask_id, probability[step])
                passes[segment.model] += 1
        hidden = denoiser.hidden(ids, times[-1].expand(len(ids)))
        passes[segment.model] += 1
        return closing_function(hidden, denoiser.head, ids, first.mask_id), passes
