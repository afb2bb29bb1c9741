"""mdkern: sampling from masked diffusion language models."""

from mdkern.decoders import Ancestral
from mdkern.distributed import sample_distributed
from mdkern.engine import graphs
from mdkern.models import Denoiser, DiT, DiTConfig, adapt
from mdkern.plan import RevealPlan
from mdkern.pretrained import load_pair
from mdkern.sampling import History, SampleOutput, sample
from mdkern.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "Ancestral",
    "Denoiser",
    "DiT",
    "DiTConfig",
    "History",
    "RevealPlan",
    "SampleOutput",
    "Schedule",
    "adapt",
    "graphs",
    "load_pair",
    "sample",
    "sample_distributed",
]
