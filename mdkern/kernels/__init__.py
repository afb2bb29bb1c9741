"""The operators: one per file, contract first; `reference` holds each of them in plain PyTorch."""

from mdkern.kernels.head.divergence import RowDivergence, divergence
from mdkern.kernels.head.vocab_projection import RowStatistics, vocab_projection
from mdkern.kernels.loop.compact import compact
from mdkern.kernels.loop.select import select

__all__ = ["RowDivergence", "RowStatistics", "compact", "divergence", "select", "vocab_projection"]
