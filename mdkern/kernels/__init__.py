"""The operators. Each has a file with its contract and reference; the kernels that run it are chosen by the device."""

from mdkern.kernels.head.divergence import RowDivergence, divergence
from mdkern.kernels.head.soft_embedding import soft_embedding
from mdkern.kernels.head.vocab_projection import RowStatistics, vocab_projection
from mdkern.kernels.loop.compact import compact
from mdkern.kernels.loop.select import select

__all__ = ["RowDivergence", "RowStatistics", "compact", "divergence", "select", "soft_embedding", "vocab_projection"]
