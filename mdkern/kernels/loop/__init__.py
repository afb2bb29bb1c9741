"""The sampler's own operators: which positions are revealed, and the bookkeeping of a tick."""
