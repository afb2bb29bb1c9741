"""`diffusion_generate` of Dream's ``generation_utils.py`` (Ye et al., 2508.15487; github.com/DreamLM/Dream).

Fast-dLLM's additions for Dream are here as well: ``alg="confidence_threshold"``, `block_length` and `dual_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from mdkern.compat import common
from mdkern.compat.common import check_blocks, denoiser_of, refuse, with_masks
from mdkern.decoders import Ancestral, Decoder, Entropy, Margin, TopProbability
from mdkern.decoders.block_start import StartedEntropy, StartedThreshold
from mdkern.decoders.quotas import DreamQuota
from mdkern.decoders.threshold import PacedThreshold
from mdkern.output import SampleOutput
from mdkern.sampling import sample

__all__ = ["AutoModel", "DreamGenerationConfig", "DreamGenerationMixin", "DreamModelOutput", "diffusion_generate"]

RANKED: dict[str, type[Any]] = {"maskgit_plus": TopProbability, "topk_margin": Margin, "entropy": Entropy}
REFUSED = {
    "generation_tokens_hook_func": "tokens are not handed out between steps. To show drafts give a streamer that has"
    " put_draft; to fix tokens put them into the prompt among masks",
    "generation_logits_hook_func": "logits are computed only where they are wanted. Give logits_processor=, a callable"
    " (input_ids, scores, positions) -> scores",
    **dict.fromkeys(
        ("eos_token_id", "pad_token_id", "bos_token_id"),
        "Dream's loop does not look at it. stop_at_eos=True ends texts at the model's end of text",
    ),
    "do_sample": "a temperature of 0 is greedy",
}


@dataclass
class DreamGenerationConfig:
    """The settings of a generation with Dream's defaults, as the class of that name in Dream's code."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_length: int | None = None  # prompt included; None: 20 more than the prompt
    max_new_tokens: int | None = None
    eps: float = 1e-3
    steps: int = 512
    alg: str = "origin"
    alg_temp: float | None = None
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    output_history: bool = False
    mask_token_id: int | None = None


@dataclass
class DreamModelOutput(ModelOutput):
    """What `diffusion_generate` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: int64 ``[B, L]``.
        history: with ``output_history=True``, the sequences after each step, masks included.
    """

    sequences: Tensor | None = None
    history: tuple[Tensor, ...] | None = None


def diffusion_generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    attention_mask: Tensor | None = None,
    threshold: float | None = None,
    block_length: int | None = None,
    dual_cache: bool | None = None,
    **kwargs: Any,
) -> Tensor | DreamModelOutput:
    """Texts after prompts, with the arguments and defaults of Dream's own method.

    Args:
        model: a model of Dream's kind, or what `mdkern.adapt` or `mdkern.from_pretrained` made of one.
        inputs: int64 ``[B, P]``, padded on the left; masks in them are filled in. ``input_ids`` is another name.
        generation_config: a `DreamGenerationConfig`, or any object with some of its attributes.
        attention_mask: ``[B, P]``, 0 at padding.
        threshold: for ``alg="confidence_threshold"`` of Fast-dLLM; None: 0.9.
        block_length: write in blocks of so many tokens with a KV cache, as Fast-dLLM does with Dream. The first step of
            a block then reveals its first token. `alg` must be ``"confidence_threshold"`` or ``"entropy"``.
        dual_cache: with `block_length`, keep what comes after the block as well.
        kwargs: fields of `DreamGenerationConfig`, and further arguments of `mdkern.sample`.

    Returns:
        int64 ``[B, L]``, or a `DreamModelOutput`.

    Raises:
        ValueError: arguments that do not fit or could have no effect, before any forward pass.
    """
    refuse(REFUSED, kwargs)
    options = {name: value for name, value in kwargs.items() if name not in REFUSED}
    if inputs is None:
        inputs = options.pop("input_ids", None)
    config = settings_of(generation_config, options)
    decoder = decoder_of(config, threshold) if block_length is None else block_decoder(config, threshold)
    if dual_cache is not None and block_length is None:
        raise ValueError("dual_cache goes with block_length: without blocks there is no cache")
    denoiser = denoiser_of(model, config.mask_token_id)
    if inputs is None:
        raise ValueError("inputs must be given: the ids of the prompts, [B, P]")
    count = new_tokens(config, inputs.shape[-1], denoiser.max_length)
    ids, mask = with_masks(denoiser, inputs, attention_mask, count, fill_in=block_length is None)
    if config.num_return_sequences != 1:
        ids = ids.repeat_interleave(config.num_return_sequences, dim=0)
        mask = None if mask is None else mask.repeat_interleave(config.num_return_sequences, dim=0)
    if block_length is not None:
        check_blocks(count, block_length, config.steps)
        if config.alg == "entropy" and config.steps < 2 * (count // block_length):
            raise ValueError(f"steps must be at least 2 for each block, the first of which reveals one token: give"
                             f" {2 * (count // block_length)} or more, not {config.steps}")  # fmt: skip
        options |= {"block_length": block_length, "cache": "dual" if dual_cache else "prefix"}
    if config.alg != "origin" or config.temperature > 0.0:  # else what they cut is never looked at
        options |= {"top_p": config.top_p, "top_k": config.top_k}
    out = sample(
        denoiser,
        input_ids=ids,
        attention_mask=mask,
        steps=config.steps,
        temperature=config.temperature,
        decoder=decoder,
        return_history=config.output_history,
        **options,
    )
    if not config.return_dict_in_generate:
        assert out.sequences is not None
        return out.sequences
    history = after_each_step(out, denoiser.mask_id) if config.output_history else None
    return DreamModelOutput(sequences=out.sequences, history=history)


def settings_of(generation_config: Any, options: dict[str, Any]) -> DreamGenerationConfig:
    """The settings that are given; those among `options` are taken out of it and come first."""
    names = [field.name for field in fields(DreamGenerationConfig)]
    told = {name: value for name in names if (value := getattr(generation_config, name, None)) is not None}
    told |= {name: options.pop(name) for name in names if name in options}
    return DreamGenerationConfig(**told)


def decoder_of(config: DreamGenerationConfig, threshold: float | None) -> Decoder:
    """The decoder that the settings mean."""
    check_alg(config, threshold)
    if config.alg == "confidence_threshold":
        return PacedThreshold(0.9 if threshold is None else threshold, of="sampler")
    if config.alg == "origin":
        return Ancestral(eps=config.eps, closing_pass=False)
    quota = DreamQuota(config.eps, least=0)
    ranked: Decoder = RANKED[config.alg](config.alg_temp or 0.0, quota=quota, of="sampler")
    return ranked


def block_decoder(config: DreamGenerationConfig, threshold: float | None) -> Decoder:
    """The decoder that the settings mean in blocks with a cache."""
    check_alg(config, threshold)
    if config.alg == "confidence_threshold":
        return StartedThreshold(0.9 if threshold is None else threshold, of="sampler")
    if config.alg != "entropy":
        raise ValueError(
            f"block_length needs alg='confidence_threshold' or alg='entropy', not {config.alg!r}: in blocks Fast-dLLM's"
            " code ranks by entropy whatever else alg says"
        )
    return StartedEntropy(config.alg_temp or 0.0, quota=DreamQuota(config.eps, least=0), of="sampler")


def check_alg(config: DreamGenerationConfig, threshold: float | None) -> None:
    """Refuse settings that could have no effect."""
    alg = config.alg
    known = ("origin", *RANKED, "confidence_threshold")
    if alg not in known:
        raise ValueError(f"alg must be one of {', '.join(known)}, not {alg!r}")
    if config.top_p is not None and config.top_p < 1.0 and config.top_k is not None:
        raise ValueError("top_p and top_k must not both be given: Dream applies top_p first, mdkern top_k, so that the"
                         " tokens would differ")  # fmt: skip
    if threshold is not None and alg != "confidence_threshold":
        raise ValueError(f'threshold goes with alg="confidence_threshold", not with {alg!r}')
    if config.alg_temp and alg not in RANKED:
        raise ValueError(f"alg_temp goes with alg={', '.join(map(repr, RANKED))}, not with {alg!r}")
    if config.output_history and not config.return_dict_in_generate:
        raise ValueError("output_history needs return_dict_in_generate=True, or there is nothing to return it in")
    if alg == "confidence_threshold" and config.output_history:
        raise ValueError("output_history does not go with alg='confidence_threshold', which has no fixed steps")


def new_tokens(config: DreamGenerationConfig, prompt: int, longest: int | None) -> int:
    """Number of masks after prompts of this length: of `max_new_tokens`, or else of `max_length`, or else 20."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is not None:
        if config.max_length <= prompt:
            raise ValueError(f"max_length must be above the prompt's {prompt} tokens, not {config.max_length}")
        return config.max_length - prompt
    return min(20, (longest or prompt + 20) - prompt)


def after_each_step(out: SampleOutput, mask_id: int) -> tuple[Tensor, ...]:
    """The sequences after each step, int64 ``[B, L]`` each."""
    assert out.sequences is not None
    assert out.history is not None
    step = out.history.step
    return tuple(out.sequences.masked_fill(step > number, mask_id) for number in range(out.history.steps))


class AutoModel(common.AutoModel):
    """As `mdkern.compat.common.AutoModel`, and a model's ``diffusion_generate`` is the one of this module."""

    @staticmethod
    def from_pretrained(name_or_path: Any, **options: Any) -> Any:
        model = common.AutoModel.from_pretrained(name_or_path, **options)
        model.diffusion_generate = MethodType(diffusion_generate, model)
        return model


class DreamGenerationMixin:
    """In the place of the class of ``generation_utils.py``, whose methods Fast-dLLM's scripts bind to a model."""

    diffusion_generate = diffusion_generate
    _sample = diffusion_generate
