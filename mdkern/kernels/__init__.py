"""The operators: one per file, contract first; `reference` holds each of them in plain PyTorch."""

from mdkern.kernels.compact import compact
from mdkern.kernels.divergence import RowDivergence, divergence
from mdkern.kernels.select import select
from mdkern.kernels.vocab_projection import RowStatistics, vocab_projection

__all__ = ["RowDivergence", "RowStatistics", "compact", "divergence", "select", "vocab_projection"]
