"""Checks the decoder of a call, and whether it can do its work with the call's other arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdkern.decoders import Decoder, Stepwise
from mdkern.engine.checks import refuse_class
from mdkern.kernels.head.arguments import Filters
from mdkern.models import Denoiser


def resolve_decoder(decoder: Any, denoiser: Denoiser) -> Decoder:
    refuse_class("decoder", decoder)
    if not isinstance(decoder, Decoder):
        raise TypeError(f"decoder must be a decoder of mdkern.decoders or its name, not {type(decoder).__name__}")
    fitted: Any = decoder.fitted(denoiser.vocab_size, denoiser.device)
    if not isinstance(fitted, type(decoder)):
        raise ValueError(f"{type(decoder).__name__}: fitted must return the decoder, not {type(fitted).__name__}")
    return fitted


def check_filters_act(filters: Filters, temperature: float, decoder: Decoder) -> None:
    """Refuse filters at temperature 0 where nothing reads what they cut."""
    ranked = isinstance(decoder, Stepwise) and decoder.of == "sampler"
    if filters.active() and temperature == 0.0 and not ranked:
        raise ValueError(
            "top_k, top_p and min_p must be left out at temperature 0: the most probable id is taken whatever they cut,"
            ' unless a decoder with of="sampler" ranks positions by what they leave'
        )


def check_decoder(
    decoder: Decoder, temperature: float, block_length: int | None, guided: bool, denoisers: Mapping[str, Denoiser]
) -> None:
    """Refuse a decoder that cannot do its work at this temperature, in these blocks, guided, or with these models."""
    if not isinstance(decoder, Stepwise):
        return
    name = type(decoder).__name__
    needed = decoder.only_block_length
    if needed not in (None, block_length):
        raise ValueError(f"block_length must be {needed}, not {block_length}: this {name} was made for such blocks")
    if decoder.greedy and temperature > 0.0:
        raise ValueError(
            f"temperature must be 0 with {name}, not {temperature:g}: it takes the token of a pass for the most"
            " probable one"
        )
    if not decoder.soft:
        return
    if not decoder.greedy or not decoder.adaptive:
        raise ValueError(f"{name} has soft inputs, so it must be greedy and adaptive: set both to True")
    if guided:
        raise ValueError(
            f"guidance_scale must be 0 with {name}: the passes with and without the prompt differ in how sure they are"
            " of a token, and soft inputs have one probability for both"
        )
    without = [key for key, denoiser in denoisers.items() if not denoiser.takes_soft]
    if without:
        denoiser = denoisers[without[0]]
        because = f" because {denoiser.no_soft_reason}" if denoiser.no_soft_reason else ""
        raise ValueError(
            f"{name} gives the model mixtures of tokens and the mask: model {without[0]} ({denoiser.name}) cannot take"
            f" them{because}. A DiT can, a Hugging Face model that looks up its ids once, and a Denoiser with"
            f" takes_soft; {name} with soft=False runs with any model"
        )
