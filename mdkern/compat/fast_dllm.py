"""The functions of Fast-dLLM's ``llada/generate.py`` (Wu et al., 2505.22618; github.com/NVlabs/Fast-dLLM), and its
generation of Dream under blocks and caches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdkern.compat import dream, llada
from mdkern.compat.common import denoiser_of
from mdkern.compat.dream import AutoModel
from mdkern.decoders import Decoder, Factor, Threshold

__all__ = ["AutoModel", "DreamGenerationMixin", "generate", "generate_with_dual_cache", "generate_with_prefix_cache"]


def generate(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """Answers to prompts, with the arguments and defaults of Fast-dLLM's function for LLaDA without a cache.

    Args:
        model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id: as in
            `mdkern.compat.llada.generate`. With a `threshold` or `factor`, `steps` has no effect, as in the original.
        threshold: reveal all tokens that are at least so probable, and always the best.
        factor: reveal as many as are jointly probable enough, see `mdkern.decoders.Factor`.
        options: further arguments of `mdkern.sample`, such as ``attention_mask`` for prompts padded on the left.

    Returns:
        int64 ``[B, P + gen_length]``, the prompts and the answers; and the number of forward passes, of the sequence
        that took the most.

    Raises:
        ValueError: arguments that do not fit, before any forward pass.
    """
    mask = options.pop("attention_mask", None)
    options |= {"temperature": temperature, "decoder": decoder_of(remasking, threshold, factor)}
    out = llada.answers(denoiser_of(model, mask_id), prompt, mask, steps, gen_length, block_length, **options)
    assert out.sequences is not None
    assert out.nfe is not None
    return out.sequences, max(int(passes.max()) for passes in out.nfe.values())


def generate_with_prefix_cache(model: Any, prompt: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, int]:
    """`generate` with the keys and values of everything before the block kept, ``cache="prefix"``."""
    return generate(model, prompt, *arguments, cache="prefix", **options)


def generate_with_dual_cache(model: Any, prompt: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, int]:
    """`generate` with the keys and values of everything around the block kept, ``cache="dual"``."""
    return generate(model, prompt, *arguments, cache="dual", **options)


def decoder_of(remasking: str, threshold: float | None, factor: float | None) -> Decoder:
    """The decoder that these arguments mean."""
    ordered = llada.decoder_of(remasking)
    if threshold is None and factor is None:
        return ordered
    if threshold is not None and factor is not None:
        raise ValueError("threshold and factor must not both be given: each of them alone says what is revealed")
    if remasking != "low_confidence":
        raise ValueError(f"remasking={remasking!r} does not go with a threshold or factor: they rank by probability")
    return Threshold(threshold) if threshold is not None else Factor(factor, rule="code")  # type: ignore[arg-type]


class DreamGenerationMixin:
    """In the place of the class of ``dream/model/generation_utils_block.py``, whose methods scripts bind to a model."""

    def diffusion_generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, block_length: int | None = 32, **kwargs: Any
    ) -> Any:
        """`mdkern.compat.dream.diffusion_generate` in blocks, with a prefix cache or, by `dual_cache`, a dual one."""
        return dream.diffusion_generate(self, inputs, generation_config, block_length=block_length, **kwargs)

    _sample = diffusion_generate
