"""A decoder and the plain loop that it is compared with, and bounds for models with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.plain_loop import Plain
from mdkern import sample
from mdkern.decoders import Decoder


@dataclass(frozen=True)
class Gauge:
    """The bounds of the decoders that have one: threshold, factor and entropy bound; by default as published."""

    threshold: float = 0.9
    factor: float = 1.0
    gamma: float = 0.1
    edit: tuple[float, float, int] = (0.7, 0.5, 16)

    @staticmethod
    def of(probability: Tensor, entropy: Tensor) -> Gauge:
        """Bounds at which a model with random weights reveals several tokens in each of its first passes.

        The threshold lets half of a block pass, the factor a quarter of it, the entropy bound 8 positions.

        Args:
            probability: ``[B, R]``, the largest at each position of a block.
            entropy: ``[B, M]``, nats, at each masked position.
        """
        best, quarter = probability.sort(-1, descending=True).values, max(1, probability.shape[1] // 4)
        threshold = float(probability.median())
        factor = float(((quarter + 1) * (1.0 - best[:, quarter - 1])).mean())
        gamma = float(entropy.sort(-1).values[:, :7].sum(-1).mean())
        return Gauge(threshold, factor, gamma, (threshold, 0.9, 1))


@dataclass(frozen=True)
class Case:
    """A decoder of ours, and its plain loop."""

    name: str
    source: str  # whose loop it is
    ours: Decoder
    plain: Plain | None  # None: `mdkern.profiling.eager.ddpm`
    temperature: float = 1.0
    block_length: int | None = None
    top_p: float = 1.0


def run_ours(model: Any, case: Case, ids: Tensor, steps: int, seed: int, **more: Any) -> Any:
    """`sample` of ``ids [N, L]`` in one batch by the case's decoder."""
    return sample(
        model,
        input_ids=ids,
        steps=steps,
        batch_size=len(ids),
        temperature=case.temperature,
        top_p=case.top_p,
        decoder=case.ours,
        block_length=case.block_length,
        seed=seed,
        progress=False,
        **more,
    )
