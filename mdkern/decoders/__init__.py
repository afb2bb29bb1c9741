"""Decoders: the rules that say which positions are revealed at a step."""

from mdkern.decoders.ancestral import Ancestral

__all__ = ["Ancestral"]
