"""Every decoder with the plain loop it is held against, and the bounds for models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain_decoders as plain
from benchmarks.plain_decoders import Plain
from mdkern import decoders, sample
from mdkern.decoders import Decoder


@dataclass(frozen=True)
class Gauge:
    """The bounds of the decoders that reveal what they trust; by default as published."""

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


def make_cases(
    gauge: Gauge, greedy: float, length: int, vocab_size: int, block_length: int, device: torch.device
) -> list[Case]:
    """Every decoder.

    Args:
        greedy: temperature of the methods whose code is greedy unless told otherwise.
        length: positions.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(vocab_size, generator=generator).pow(8).to(device)  # few common tokens, many rare ones
    frequency = weights / weights.sum()
    exponents = torch.linspace(0.5, 2.0, length, device=device)
    levels = partial(plain.block_level, width=block_length), partial(plain.power_level, exponents=exponents)
    edit = decoders.Edit(*gauge.edit)
    in_blocks: dict[str, Any] = {"temperature": greedy, "block_length": block_length}

    def adaptive(rule: Callable[..., Tensor], closing_steps: int = 0, **bounds: float) -> Plain:
        return Plain(partial(rule, **bounds), adaptive=True, closing_steps=closing_steps)

    edits = {"mask_threshold": edit.mask_threshold, "edit_threshold": edit.edit_threshold}
    unsure: dict[str, Any] = {"temperature": greedy}
    return [
        Case("top probability", "LLaDA", decoders.TopProbability(), plain.TOP_PROBABILITY, **unsure),
        Case("threshold", "Fast-dLLM", decoders.Threshold(gauge.threshold),
             adaptive(plain.threshold, bound=gauge.threshold), **in_blocks),
        Case("ancestral", "MDLM", decoders.Ancestral(), None),
        Case("remdm cap, top-p 0.9", "ReMDM", decoders.ReMDM("cap"),
             Plain(partial(plain.remdm_cap, top_p=0.9)), top_p=0.9),
        Case("factor", "Fast-dLLM", decoders.Factor(gauge.factor),
             adaptive(plain.factor, bound=gauge.factor), **in_blocks),
        Case("entropy bound", "EB-Sampler", decoders.EntropyBound(gauge.gamma),
             adaptive(plain.entropy_bound, gamma=gauge.gamma), **unsure),
        Case("margin", "Dream", decoders.Margin(quota="dream"), plain.MARGIN, **unsure),
        Case("entropy", "Dream", decoders.Entropy(quota="dream"), plain.ENTROPY, **unsure),
        Case("position aware", "PC-Sampler", decoders.PositionAware(frequency),
             Plain(partial(plain.position_aware, frequency=frequency)), **unsure),
        Case("edit", "LLaDA 2.1", edit, adaptive(plain.edit, edit.closing_steps, **edits), **in_blocks),
        Case("random", "LLaDA", decoders.RandomRemask(), plain.RANDOM_REMASK, **unsure),
        Case("first hitting", "Zheng et al.", decoders.FirstHitting(), plain.FIRST_HITTING),
        Case("hyperschedule, block", "MDLM with levels", decoders.Hyperschedule("block", block_length),
             Plain(partial(plain.by_level, level=levels[0]))),
        Case("genmd4", "MDLM with levels", decoders.GenMD4(exponents),
             Plain(partial(plain.by_level, level=levels[1]))),
    ]  # fmt: skip
