"""mdkern: sampling from masked diffusion language models.

``import mdkern`` is cheap: PyTorch and transformers are imported with the first name that needs them.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdkern.canvas import sample_canvas
    from mdkern.compat.generation import generate
    from mdkern.decoders import Ancestral
    from mdkern.distributed import sample_distributed
    from mdkern.engine import graphs
    from mdkern.evaluation.likelihood import Likelihood, likelihood
    from mdkern.models import Denoiser, DiT, DiTConfig, adapt
    from mdkern.models.loading import from_pretrained
    from mdkern.models.sharded import shard_head
    from mdkern.output import History, SampleOutput
    from mdkern.plan import RevealPlan
    from mdkern.pretrained import load_pair
    from mdkern.routing import EntropyRouter, Router
    from mdkern.sampling import sample, sample_groups
    from mdkern.schedule import Schedule

__version__ = "0.2.0.dev0"  # the only place: the package's metadata are built from it

_HOMES = {  # by module, the names that it defines; mypy reads the imports above, Python this
    "mdkern.canvas": ("sample_canvas",),
    "mdkern.compat.generation": ("generate",),
    "mdkern.decoders": ("Ancestral",),
    "mdkern.distributed": ("sample_distributed",),
    "mdkern.engine": ("graphs",),
    "mdkern.evaluation.likelihood": ("Likelihood", "likelihood"),
    "mdkern.models": ("Denoiser", "DiT", "DiTConfig", "adapt"),
    "mdkern.output": ("History", "SampleOutput"),
    "mdkern.models.loading": ("from_pretrained",),
    "mdkern.models.sharded": ("shard_head",),
    "mdkern.plan": ("RevealPlan",),
    "mdkern.pretrained": ("load_pair",),
    "mdkern.sampling": ("sample", "sample_groups"),
    "mdkern.routing": ("EntropyRouter", "Router"),
    "mdkern.schedule": ("Schedule",),
}

__all__ = [
    "Ancestral",
    "Denoiser",
    "DiT",
    "DiTConfig",
    "EntropyRouter",
    "History",
    "Likelihood",
    "RevealPlan",
    "Router",
    "SampleOutput",
    "Schedule",
    "adapt",
    "from_pretrained",
    "generate",
    "graphs",
    "likelihood",
    "load_pair",
    "sample",
    "sample_canvas",
    "sample_distributed",
    "sample_groups",
    "shard_head",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package such as ``mdkern.decoders``, when it is first asked for."""
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(__import__(home, fromlist=[name]), name)  # as "from home import name"
            return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
