"""The operators: one per file, contract first; `reference` holds each of them in plain PyTorch."""

from mdkern.kernels.vocab_projection import RowStatistics, vocab_projection

__all__ = ["RowStatistics", "vocab_projection"]
