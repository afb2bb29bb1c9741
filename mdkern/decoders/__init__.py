"""Decoders: the rules that say which positions are revealed at a step."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from mdkern.decoders.ancestral import Ancestral
from mdkern.decoders.base import Canvas, Choice, Decoder, Planned, Proposal, Stepwise, View, even_quota
from mdkern.decoders.edit import Edit
from mdkern.decoders.entropy import Entropy
from mdkern.decoders.entropy_bound import EntropyBound
from mdkern.decoders.factor import Factor
from mdkern.decoders.first_hitting import FirstHitting
from mdkern.decoders.genmd4 import GenMD4
from mdkern.decoders.hyperschedule import Hyperschedule
from mdkern.decoders.margin import Margin
from mdkern.decoders.position_aware import PositionAware, reference_frequencies
from mdkern.decoders.quotas import dream_quota
from mdkern.decoders.random_remask import RandomRemask
from mdkern.decoders.remdm import ReMDM
from mdkern.decoders.threshold import Threshold
from mdkern.decoders.top_probability import TopProbability

DECODERS: dict[str, type[Any]] = {
    "ancestral": Ancestral,
    "first_hitting": FirstHitting,
    "random": RandomRemask,
    "hyperschedule": Hyperschedule,
    "genmd4": GenMD4,
    "top_probability": TopProbability,
    "margin": Margin,
    "entropy": Entropy,
    "threshold": Threshold,
    "factor": Factor,
    "entropy_bound": EntropyBound,
    "position_aware": PositionAware,
    "remdm": ReMDM,
    "edit": Edit,
}


def by_name(name: str) -> Decoder:
    """The decoder of that name with its default parameters.

    Raises:
        ValueError: there is no such name, or the decoder has a parameter without a default.
    """
    if name not in DECODERS:
        raise ValueError(f"decoder {name!r} is not known: there is {', '.join(DECODERS)}")
    kind = DECODERS[name]
    needed = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    if needed:
        arguments = ", ".join(f"{parameter}=..." for parameter in needed)
        raise ValueError(f"decoder {name!r} has no default for {', '.join(needed)}: give {kind.__name__}({arguments})")
    decoder: Decoder = kind()
    return decoder


__all__ = [
    "DECODERS",
    "Ancestral",
    "Canvas",
    "Choice",
    "Decoder",
    "Edit",
    "Entropy",
    "EntropyBound",
    "Factor",
    "FirstHitting",
    "GenMD4",
    "Hyperschedule",
    "Margin",
    "Planned",
    "PositionAware",
    "Proposal",
    "RandomRemask",
    "ReMDM",
    "Stepwise",
    "Threshold",
    "TopProbability",
    "View",
    "by_name",
    "dream_quota",
    "even_quota",
    "reference_frequencies",
]
