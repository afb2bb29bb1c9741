"""`generate` of LLaDA's ``generate.py`` (Nie et al., 2502.09992; github.com/ML-GSAI/LLaDA)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdkern.compat.common import AutoModel, check_blocks, denoiser_of, with_masks
from mdkern.decoders import Decoder, RandomRemask, TopProbability
from mdkern.models import Denoiser
from mdkern.output import SampleOutput
from mdkern.sampling import sample

__all__ = ["AutoModel", "generate"]

REMASKING: dict[str, type[Decoder]] = {"low_confidence": TopProbability, "random": RandomRemask}


def generate(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    **options: Any,
) -> Tensor:
    """Answers to prompts, with the arguments and defaults of LLaDA's own function.

    Args:
        model: a model of LLaDA's kind, or what `mdkern.adapt` or `mdkern.from_pretrained` made of one.
        prompt: int64 ``[B, P]``. Prompts of different lengths are padded on the left.
        attention_mask: ``[B, P]``, 0 at padding.
        steps: of all blocks together, a multiple of their number.
        gen_length: number of tokens to be written, a multiple of `block_length`.
        block_length: blocks are written from left to right.
        temperature, cfg_scale: ``temperature`` and ``guidance_scale`` of `mdkern.sample`.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_id: None: the model's own, which for LLaDA is 126336, the default of the original.
        logits_eos_inf: never write the first end of text of the model.
        confidence_eos_eot_inf: refused, as it ranks positions by a distribution that the sampler does not compute.
        options: further arguments of `mdkern.sample`: ``seed``, ``batch_size``, ``stop_at_eos``, ``streamer``, ...

    Returns:
        int64 ``[B, P + gen_length]``: the prompts and the answers.

    Raises:
        ValueError: arguments that do not fit, before any forward pass.
    """
    denoiser = denoiser_of(model, mask_id)
    decoder = decoder_of(remasking)
    if confidence_eos_eot_inf:
        raise ValueError(
            "confidence_eos_eot_inf is not served here: it ranks positions by a distribution without the ends of text,"
            " which the sampler does not compute. logits_eos_inf=True forbids the end of text altogether"
        )
    if logits_eos_inf:
        options["logits_processor"] = without_end(denoiser.eos_ids, options.get("logits_processor"))
    options |= {"guidance_scale": cfg_scale, "temperature": temperature, "decoder": decoder}
    out = answers(denoiser, prompt, attention_mask, steps, gen_length, block_length, **options)
    assert out.sequences is not None
    return out.sequences


def decoder_of(remasking: str) -> Decoder:
    """The decoder of that name."""
    if remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {', '.join(REMASKING)}, not {remasking!r}")
    return REMASKING[remasking]()


def answers(
    denoiser: Denoiser,
    prompt: Tensor,
    attention_mask: Tensor | None,
    steps: int,
    gen_length: int,
    block_length: int,
    **options: Any,
) -> SampleOutput:
    """`sample` for masks after prompts, in blocks that divide them and with steps that divide among the blocks."""
    check_blocks(gen_length, block_length, steps)
    ids, mask = with_masks(denoiser, prompt, attention_mask, gen_length, fill_in=False)
    return sample(denoiser, input_ids=ids, attention_mask=mask, steps=steps, block_length=block_length, **options)


def without_end(eos_ids: tuple[int, ...], others: Any) -> list[Any]:
    """Logits processors that forbid the first end of text, before the others."""
    from transformers import SuppressTokensLogitsProcessor

    if not eos_ids:
        raise ValueError("logits_eos_inf needs a model with an end of text: its config names none")
    others = [] if others is None else others if isinstance(others, list) else [others]
    return [SuppressTokensLogitsProcessor([eos_ids[0]], device="cpu"), *others]
