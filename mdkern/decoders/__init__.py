"""Decoders: the rules that say which positions are revealed at a step.

Each decoder is a file of this folder. All files are imported, and decoders that have a name for ``decoder=`` are also
exported from this package, so that ``mdkern.decoders.Threshold(0.9)`` works.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from mdkern.decoders.base import DECODERS, Canvas, Choice, Decoder, Planned, Proposal, Stepwise, View, even_quota
from mdkern.decoders.policy import Policy
from mdkern.decoders.position_aware import reference_frequencies
from mdkern.decoders.quotas import DreamQuota, dream_quota

if TYPE_CHECKING:  # for editors and type checkers
    from mdkern.decoders.ancestral import Ancestral as Ancestral
    from mdkern.decoders.edit import Edit as Edit
    from mdkern.decoders.entropy import Entropy as Entropy
    from mdkern.decoders.entropy_bound import EntropyBound as EntropyBound
    from mdkern.decoders.factor import Factor as Factor
    from mdkern.decoders.first_hitting import FirstHitting as FirstHitting
    from mdkern.decoders.genmd4 import GenMD4 as GenMD4
    from mdkern.decoders.hyperschedule import Hyperschedule as Hyperschedule
    from mdkern.decoders.learned import Learned as Learned
    from mdkern.decoders.margin import Margin as Margin
    from mdkern.decoders.position_aware import PositionAware as PositionAware
    from mdkern.decoders.random_remask import RandomRemask as RandomRemask
    from mdkern.decoders.remdm import ReMDM as ReMDM
    from mdkern.decoders.soft_parallel import SoftParallel as SoftParallel
    from mdkern.decoders.threshold import Threshold as Threshold
    from mdkern.decoders.top_probability import TopProbability as TopProbability


def by_name(name: str) -> Decoder:
    """The decoder with this name and default parameters.

    Raises:
        ValueError: there is no such name, or the decoder has a parameter without a default.
    """
    if name not in DECODERS:
        raise ValueError(f"decoder {name!r} is not known: there is {', '.join(sorted(DECODERS))}")
    kind = DECODERS[name]
    parameters = fields(kind) if is_dataclass(kind) else ()
    needed = [field.name for field in parameters if field.default is MISSING and field.default_factory is MISSING]
    if needed:
        arguments = ", ".join(f"{parameter}=..." for parameter in needed)
        raise ValueError(f"decoder {name!r} has no default for {', '.join(needed)}: give {kind.__name__}({arguments})")
    decoder: Decoder = kind()
    return decoder


def find_decoders() -> list[str]:
    """Import the modules of this folder, which enters their classes in `DECODERS` and here. Returns the class names."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    found = {kind.__name__: kind for kind in DECODERS.values() if kind.__module__.startswith(f"{__name__}.")}
    globals().update(found)
    return sorted(found)


__all__ = [
    "DECODERS",
    "Canvas",
    "Choice",
    "Decoder",
    "DreamQuota",
    "Planned",
    "Policy",
    "Proposal",
    "Stepwise",
    "View",
    "by_name",
    "dream_quota",
    "even_quota",
    "reference_frequencies",
    *find_decoders(),
]
