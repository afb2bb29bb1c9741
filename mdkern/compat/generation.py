"""`generate`: mdkern in the place of transformers' loop, ``model.generate(ids, custom_generate=mdkern.generate)``.

transformers prepares the prompts, the generation config, the logits processors and the stopping criteria, and calls
this function in the place of its loop. That works from transformers 4.57 on, for classes that have its ``generate``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdkern.compat.common import with_masks
from mdkern.decoders import Decoder
from mdkern.models import Denoiser, adapt
from mdkern.models.denoiser import listed
from mdkern.output import SampleOutput
from mdkern.sampling import sample
from mdkern.schedule import Schedule

# What transformers prepares for a loop that writes from left to right with a cache.
FOR_ITS_LOOP = (
    "cache_position",
    "past_key_values",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "num_logits_to_keep",
)
# Settings of a generation config that a call of `generate` by itself may have.
SETTINGS = (
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "num_return_sequences",
    "eos_token_id", "return_dict_in_generate",
)  # fmt: skip
# Prepared from settings that `sample` takes itself, in the order of the sampler.
WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper")
ENDS = ("MaxLengthCriteria", "EosTokenCriteria")
WITHOUT_EFFECT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    decoder: str | Decoder = "top_probability",
    light: Any = None,
    schedule: str | Schedule | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    steps_per_block: int | None = None,
    cache: str = "none",
    mask_id: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    text_streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | SampleOutput:
    """Texts after prompts, as ``model.generate(ids, custom_generate=mdkern.generate, ...)`` or called by itself.

    From the generation config come the length (``max_new_tokens``, ``max_length``), ``do_sample`` (without it the most
    probable tokens are taken), ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``num_return_sequences`` and
    ``eos_token_id``, at which texts end. All arguments below may be given to ``model.generate``.

    Args:
        model: a model of transformers that sees its whole text; called by itself, whatever `mdkern.adapt` takes.
        input_ids: int64 ``[B, P]``, padded on the left if the prompts differ in length.
        logits_processor, stopping_criteria: those that work here, see `mdkern.engine.processors`.
        generation_config: None: made of ``max_new_tokens`` and the other settings among `model_kwargs`.
        decoder, light, schedule, steps, block_length, steps_per_block, cache, batch_size, seed: as in `mdkern.sample`;
            `model` is the heavy one.
        text_streamer: the ``streamer`` of `mdkern.sample`. That of ``model.generate`` is not passed on by transformers.
        mask_id: the mask token's id, if the model's config has none.
        model_kwargs: ``attention_mask``, and what transformers prepares for its own loop, which is not needed.

    Returns:
        int64 ``[B, L]``, prompts and texts; a `SampleOutput` if the config says ``return_dict_in_generate``.

    Raises:
        ValueError: settings that do not work or could have no effect, before any forward pass.
    """
    from transformers import GenerationConfig

    alone = generation_config is None
    if alone:
        given = {name: model_kwargs.pop(name) for name in SETTINGS if name in model_kwargs}
        generation_config = GenerationConfig(**given)
        if generation_config.max_new_tokens is None and "max_length" not in given:
            raise ValueError("max_new_tokens must be given: the number of tokens to be written")
    attention_mask = model_kwargs.pop("attention_mask", None)
    check_settings(generation_config, [name for name in model_kwargs if name not in FOR_ITS_LOOP])
    if alone and (generation_config.num_return_sequences or 1) > 1:
        input_ids = input_ids.repeat_interleave(generation_config.num_return_sequences, dim=0)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(generation_config.num_return_sequences, dim=0)
    heavy = denoiser_for(model, mask_id, generation_config)
    ids, mask = with_masks(heavy, input_ids, attention_mask, new_tokens(generation_config, input_ids), fill_in=True)
    out = sample(
        heavy,
        light,
        schedule,
        input_ids=ids,
        attention_mask=mask,
        steps=steps,
        steps_per_block=steps_per_block,
        block_length=block_length,
        cache=cache,
        decoder=decoder,
        batch_size=batch_size,
        seed=seed,
        streamer=text_streamer,
        logits_processor=without(WARPERS, logits_processor),
        stopping_criteria=without(ENDS, stopping_criteria),
        stop_at_eos=bool(heavy.eos_ids),
        **drawing(generation_config),
    )
    if generation_config.return_dict_in_generate:
        return out
    assert out.sequences is not None
    return out.sequences


def check_settings(config: Any, unknown: list[str]) -> None:
    """Refuse settings that do not work, or could have no effect."""
    if unknown:
        raise ValueError(f"{unknown[0]} could have no effect: mdkern.generate does not know it. Leave it out")
    if (getattr(config, "num_beams", None) or 1) > 1:
        raise ValueError("num_beams must be 1: there are no beams where text is not written from left to right")
    if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        raise ValueError(
            "guidance_scale of transformers compares with the last token of the prompt alone. Call mdkern.sample(model,"
            " guidance_scale=...), which masks the prompt"
        )
    asked = [name for name in WITHOUT_EFFECT if getattr(config, name, None)]
    if asked:
        raise ValueError(f"{asked[0]} could have no effect: the logits of all positions are not kept. Leave it out")


def denoiser_for(model: Any, mask_id: int | None, config: Any) -> Denoiser:
    """The model as a denoiser whose ends of text are those of the generation config, if it names some."""
    ends = [int(item) for item in listed(getattr(config, "eos_token_id", None))]
    if isinstance(model, Denoiser) and (mask_id is not None or ends):
        raise ValueError("mask_id and eos_token_id are the denoiser's own: give them to mdkern.adapt")
    return adapt(model, mask_id=mask_id, eos_id=ends or None)


def new_tokens(config: Any, input_ids: Tensor) -> int:
    """Number of masks after prompts ``[B, P]``."""
    prompt = input_ids.shape[-1]
    count = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - prompt
    if count < 1:
        raise ValueError(f"max_length must be above the prompt's {prompt} tokens, not {config.max_length}")
    return int(count)


def without(names: tuple[str, ...], hooks: Any) -> Any:
    """The hooks that are not of these classes of transformers; None if there are none."""
    listed_hooks = hooks if isinstance(hooks, list) else [] if hooks is None else [hooks]
    return [hook for hook in listed_hooks if type(hook).__name__ not in names] or None


def drawing(config: Any) -> dict[str, Any]:
    """How tokens are drawn, as arguments of `mdkern.sample`."""
    if not config.do_sample:
        return {"temperature": 0.0}
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    return {
        "temperature": temperature,
        "top_k": getattr(config, "top_k", None) or None,
        "top_p": getattr(config, "top_p", None),
        "min_p": getattr(config, "min_p", None),
    }
