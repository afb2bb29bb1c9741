"""Denoisers: our DiT, and adapters that split other models into backbone and head."""

from mdkern.models.adapters import adapt
from mdkern.models.checkpoint import load_dit, load_mdlm, save_dit
from mdkern.models.denoiser import Denoiser, Head
from mdkern.models.dit import DiT, DiTConfig

__all__ = ["Denoiser", "DiT", "DiTConfig", "Head", "adapt", "load_dit", "load_mdlm", "save_dit"]
