"""Checks the arguments of `mdkern.sample` and fills in defaults. Wrong arguments are refused before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mdkern.decoders import Decoder, Planned, Stepwise, by_name
from mdkern.decoders.base import keeps_blocks
from mdkern.engine.checks import (
    MOST_FLOAT32,
    check_count,
    check_dense,
    check_filters,
    check_flag,
    check_real,
    refuse_class,
)
from mdkern.engine.criteria import Criteria
from mdkern.engine.processors import Processors
from mdkern.engine.request import CACHES, Request
from mdkern.engine.resolve_batch_invariant import check_batch_invariant
from mdkern.engine.resolve_blocks import resolve_blocks, resolve_pace
from mdkern.engine.resolve_decoder import check_decoder, check_filters_act, resolve_decoder
from mdkern.engine.resolve_models import resolve_models
from mdkern.kernels.head.arguments import Filters
from mdkern.models import Denoiser
from mdkern.models.denoiser import listed
from mdkern.models.sharded import sharded_over
from mdkern.routing import Router
from mdkern.schedule import Schedule

DEFAULT_BATCH_SIZE = 16
MOST_GUIDANCE = 1e6  # far above any use; logits times this are still far from float32's largest number
LEAST_TEMPERATURE = 1e-30  # anything below counts as 0, as logits divided by it may leave float32's range


def resolve_input(
    denoiser: Denoiser,
    input_ids: Any,
    attention_mask: Any,
    num_samples: int | None,
    length: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The ids at the start, int64 ``[N, L]`` with masks, and the attention mask or None if there is no padding."""
    num_samples = None if num_samples is None else check_count("num_samples", num_samples)
    length = None if length is None else check_count("length", length)
    if input_ids is None:
        if attention_mask is not None:
            raise ValueError("attention_mask needs input_ids: without a prompt there is nothing to pad")
        if length is None:
            length = denoiser.max_length
        if length is None:
            raise ValueError("length must be given: the model has no longest length to take instead")
        check_length("length", length, denoiser)
        shape = (num_samples or 1, length)
        return torch.full(shape, denoiser.mask_id, dtype=torch.int64, device=denoiser.device), None

    if length is not None:
        raise ValueError(f"length={length} must not be given together with input_ids, whose second dimension it is")
    check_ids("input_ids", input_ids, denoiser)
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [N, L] with N and L at least 1, not {tuple(input_ids.shape)}")
    check_length("input_ids' second dimension", input_ids.shape[1], denoiser)
    input_ids = input_ids.to(torch.int64)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= denoiser.vocab_size:
        raise ValueError(f"input_ids must lie in 0..{denoiser.vocab_size - 1}, but run from {low} to {high}")
    if attention_mask is not None:
        attention_mask = check_mask(attention_mask, input_ids)
    if num_samples is not None and num_samples != input_ids.shape[0]:
        if input_ids.shape[0] != 1:
            raise ValueError(f"num_samples={num_samples} does not fit the {input_ids.shape[0]} rows of input_ids")
        input_ids = input_ids.expand(num_samples, -1)
        attention_mask = None if attention_mask is None else attention_mask.expand(num_samples, -1)
    masked = input_ids == denoiser.mask_id
    if attention_mask is not None:
        masked = masked & attention_mask
    without = (~masked.any(-1)).nonzero()[:, 0]
    if len(without):
        raise ValueError(
            f"input_ids row {int(without[0])} has no masked position: "
            f"put the mask id {denoiser.mask_id} where text is wanted"
        )
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    return input_ids.clone(), attention_mask


def check_token_types(token_type_ids: Any, input_ids: Any) -> None:
    """Accept the token types that tokenizers return, if they are all 0 and so make no difference."""
    if token_type_ids is None:
        return
    same = isinstance(token_type_ids, Tensor) and getattr(input_ids, "shape", None) == token_type_ids.shape
    if not same or bool((token_type_ids != 0).any()):
        raise ValueError(
            "token_type_ids must be all 0 and of input_ids' shape: models are run on a text's first segment only"
        )


def check_ids(name: str, ids: Any, denoiser: Denoiser) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor, not {kind}")
    check_dense(name, ids)
    if ids.device != denoiser.device:
        raise ValueError(f"{name} is on {ids.device}, the model on {denoiser.device}: move one of them")


def check_length(name: str, length: int, denoiser: Denoiser) -> None:
    if denoiser.max_length is not None and length > denoiser.max_length:
        raise ValueError(
            f"{name} must be at most {denoiser.max_length}, the positions of {denoiser.name}, not {length}"
        )


def check_mask(attention_mask: Any, input_ids: Tensor) -> Tensor:
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, not {shape}")
    check_dense("attention_mask", attention_mask)
    if attention_mask.is_complex():
        raise TypeError(f"attention_mask must be of bool or whole numbers, not {attention_mask.dtype}")
    if attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask is on {attention_mask.device}, input_ids on {input_ids.device}: move one of them"
        )
    if attention_mask.dtype != torch.bool and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        low, high = attention_mask.min().item(), attention_mask.max().item()
        raise ValueError(f"attention_mask must hold 0 (padding) and 1 only, not values from {low} to {high}")
    return attention_mask.bool()


def resolve_seed(seed: Any, generator: torch.Generator | None) -> int:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")
    if seed is None:
        device = generator.device if generator is not None else "cpu"
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("seed and generator must not both be given")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f"seed must be a whole number of 64 bits, not {seed!r}")
    return int(seed)


def resolve_sample_ids(sample_ids: Any, count: int, device: torch.device) -> Tensor:
    if sample_ids is None:
        return torch.arange(count, device=device)
    try:
        numbers = torch.as_tensor(sample_ids, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sample_ids must be {count} whole numbers, not {sample_ids!r}") from error
    check_dense("sample_ids", numbers)
    if (
        numbers.dtype.is_floating_point
        or numbers.dtype.is_complex
        or numbers.dtype == torch.bool
        or tuple(numbers.shape) != (count,)
    ):
        raise ValueError(f"sample_ids must be {count} whole numbers, not {numbers.dtype} {tuple(numbers.shape)}")
    numbers = numbers.long()
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= 2**32:
        raise ValueError(f"sample_ids must lie in 0..{2**32 - 1}, but run from {low} to {high}")
    return numbers


def check_guidance(scale: Any, denoisers: Mapping[str, Denoiser]) -> float:
    scale = check_real("guidance_scale", scale, 0, MOST_GUIDANCE)
    capped = [name for name, denoiser in denoisers.items() if denoiser.head.soft_cap > 0.0]
    if scale and capped:
        raise ValueError(f"guidance_scale needs a head without a soft cap: model {capped[0]} has one")
    return scale


def check_streamer(streamer: Any, count: int) -> Any:
    refuse_class("streamer", streamer)
    missing = [name for name in ("put", "end") if streamer is not None and not hasattr(streamer, name)]
    if missing:
        raise TypeError(
            "streamer must have put and end, as those of transformers do:"
            f" {type(streamer).__name__} lacks {' and '.join(missing)}"
        )
    if count > 1 and hasattr(streamer, "stop_signal"):  # its iterator ends with the first text
        raise ValueError(
            f"streamer: {type(streamer).__name__} ends with the first text, and {count} samples are wanted: sample them"
            " one by one with a streamer each, iterate over mdkern.sample_groups, or give a TextStreamer"
        )
    return streamer


def resolve_router(schedule: Any, light: Any, heavy: Any) -> tuple[Router | None, Any, Any]:
    """A router, if one is given in the schedule's place; a schedule that names the models; and the light model."""
    if schedule is None and isinstance(light, Router):
        light, schedule = None, light
    if not isinstance(schedule, Router):
        return None, schedule, light
    given = (
        {str(name).upper() for name in heavy} if isinstance(heavy, Mapping) else {"H"} if light is None else {"H", "L"}
    )
    if not given.issuperset(schedule.models):
        raise ValueError(f"{type(schedule).__name__} chooses between {', '.join(schedule.models)}: give these models")
    return schedule, Schedule(" ".join(f"{name}1" for name in schedule.models)), light


def check_router(router: Router, decoder: Any, cache: Any) -> None:
    """Refuse a router where models cannot be chosen pass by pass."""
    kind = type(router).__name__
    if type(router).route is Router.route:
        raise TypeError(f"{kind} has no method route, which says what model runs each sequence's next pass")
    if not isinstance(decoder, Stepwise):
        raise ValueError(
            f"{kind} needs a decoder that looks at the model, such as 'top_probability' or 'threshold': the passes of"
            f" {type(decoder).__name__} are planned before the first one"
        )
    if cache != "none":
        raise ValueError(f"{kind} needs cache='none': kept keys and values are of no use to another model")


def check_padding(mask: Tensor | None, denoiser: Denoiser) -> None:
    """Refuse padding that changes what a model says of the text."""
    if mask is None:
        return
    if not denoiser.takes_attention_mask:
        raise ValueError(
            f"attention_mask must be None or all 1: {denoiser.name} takes none, or its states change with padding"
            " all the same, so nothing may be padded"
        )
    if denoiser.right_padding_only and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            f"attention_mask has padding before text, with which {denoiser.name} gives other states than without:"
            " pad on the right (tokenizer.padding_side = 'right'), or let its call take position_ids"
        )


def check_sharded(filters: Filters, processors: Any) -> None:
    """Refuse what needs all logits of a row, if no process has them because the vocabulary is divided."""
    if filters.active():
        raise ValueError(
            "top_k, top_p and min_p must be left out: where they cut is found by a search through all logits of a row,"
            " and with shard_head no process has them"
        )
    if processors is not None:
        raise ValueError(
            "logits_processor must be None: it is given all logits of a row, and with shard_head no process has them"
        )


def check_cache(cache: Any, block_length: Any, decoder: Decoder, denoisers: Mapping[str, Denoiser]) -> str:
    """The kind of cache, refused if the decoder, the blocks or a model cannot use one."""
    if not isinstance(cache, str) or cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(map(repr, CACHES))}, not {cache!r}")
    if cache == "none":
        return cache
    if isinstance(decoder, Planned):
        raise ValueError(
            f"cache={cache!r} needs a decoder that looks at the model, such as 'top_probability' or 'threshold': a pass"
            f" of {type(decoder).__name__} takes whatever sequences reveal something then, so no keys and values stay"
        )
    if block_length is None and cache != "block":
        raise ValueError(f"cache={cache!r} needs a block_length, e.g. 32: what is kept is renewed block by block")
    causal = [name for name, denoiser in denoisers.items() if denoiser.block_causal is not None]
    if causal and cache != "block":
        raise ValueError(
            f"cache={cache!r} is for models that see the whole text: model {causal[0]} sees only the blocks up to a"
            " position's own, for which cache='block' is as fast and exact"
        )
    timed = [name for name in causal if denoisers[name].time_conditioning]
    if timed:
        raise ValueError(f"cache={cache!r} needs models without time: keys and values of {timed[0]} change with it")
    without = [name for name, denoiser in denoisers.items() if not denoiser.takes_cache]
    if without:
        denoiser = denoisers[without[0]]
        because = f" because {denoiser.no_cache_reason}" if denoiser.no_cache_reason else ""
        raise ValueError(
            f"cache={cache!r} needs models that can run a part of a sequence on kept keys and values: model"
            f" {without[0]} ({denoiser.name}) cannot{because}. A DiT can, a Hugging Face model with bidirectional sdpa"
            " attention, and a Denoiser with takes_cache"
        )
    if cache == "block" and len(causal) < len(denoisers):
        name = next(name for name in denoisers if name not in causal)
        raise ValueError(
            f"cache='block' needs block-causal models: model {name} ({denoisers[name].name}) sees the whole text, so"
            " that its keys and values change with every token. cache='dual' approximates them"
        )
    return cache


def resolve(
    heavy: Any,
    light: Any = None,
    schedule: Any = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    num_samples: int | None = None,
    length: int | None = None,
    steps: int | None = None,
    steps_per_block: int | None = None,
    batch_size: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    top_p_rule: str = "reach",
    guidance_scale: float = 0.0,
    logits_processor: Any = None,
    decoder: Any = "ancestral",
    block_length: int | None = None,
    cache: str = "none",
    stop_at_eos: bool = False,
    stopping_criteria: Any = None,
    streamer: Any = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    batch_invariant: bool = False,
) -> Request:
    """Check every argument of `mdkern.sample` and fill in the defaults."""
    temperature = check_real("temperature", temperature, 0, MOST_FLOAT32)
    filters = check_filters(top_k, top_p, min_p, top_p_rule)
    processors, criteria = Processors.of(logits_processor), Criteria.of(stopping_criteria)
    batch_size = DEFAULT_BATCH_SIZE if batch_size is None else check_count("batch_size", batch_size)
    if steps is not None:
        steps = check_count("steps", steps)
    if isinstance(decoder, str):
        decoder = by_name(decoder)
    router, schedule, light = resolve_router(schedule, light, heavy)
    denoisers, schedule = resolve_models(heavy, light, schedule)
    if router is not None:
        check_router(router, decoder, cache)
        schedule = Schedule.constant(router.models[0])
    first = next(iter(denoisers.values()))
    check_token_types(token_type_ids, input_ids)
    ids, mask = resolve_input(first, input_ids, attention_mask, num_samples, length)
    for denoiser in denoisers.values():
        check_length("length" if input_ids is None else "input_ids' second dimension", ids.shape[1], denoiser)
        check_padding(mask, denoiser)
    resolved_decoder = resolve_decoder(decoder, first)
    if sharded_over(denoisers.values()) is not None:
        check_sharded(filters, processors)
    wanted = ids == first.mask_id if mask is None else (ids == first.mask_id) & mask
    block_length, causal = resolve_blocks(block_length, denoisers, mask)
    cache = check_cache(cache, block_length, resolved_decoder, denoisers)
    guidance_scale = check_guidance(guidance_scale, denoisers)
    temperature = temperature if temperature >= LEAST_TEMPERATURE else 0.0
    check_filters_act(filters, temperature, resolved_decoder)
    check_decoder(resolved_decoder, temperature, block_length, guidance_scale > 0.0, denoisers)
    keep_block = cache != "none" or keeps_blocks(resolved_decoder)
    pace = resolve_pace(schedule, steps, block_length, steps_per_block, wanted, mask, keep_block, whole_text=causal)
    batch_invariant = check_flag("batch_invariant", batch_invariant)
    if batch_invariant:
        check_batch_invariant(denoisers, resolved_decoder, router, ids.shape[1], mask)
    stop_at_eos = check_flag("stop_at_eos", stop_at_eos)
    eos_ids = tuple(dict.fromkeys(item for denoiser in denoisers.values() for item in listed(denoiser.eos_ids)))
    stops = "stop_at_eos" if stop_at_eos else "stopping_criteria"
    if (stop_at_eos or criteria is not None) and not eos_ids:
        raise ValueError(f"{stops} needs a model with eos_ids: {first.name} has none")
    return Request(
        denoisers=denoisers,
        schedule=schedule,
        decoder=resolved_decoder,
        **pace._asdict(),
        cache=cache,
        eos_ids=eos_ids,
        stop_at_eos=stop_at_eos,
        input_ids=ids,
        attention_mask=mask,
        sample_ids=resolve_sample_ids(sample_ids, ids.shape[0], ids.device),
        batch_size=batch_size,
        temperature=temperature,
        filters=filters,
        guidance_scale=guidance_scale,
        logits_processor=processors,
        stopping_criteria=criteria,
        streamer=check_streamer(streamer, len(ids)),
        seed=resolve_seed(seed, generator),
        router=router,
        batch_invariant=batch_invariant,
    )
