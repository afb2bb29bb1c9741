"""The sampler's own operators: choosing the positions to reveal, and the bookkeeping of a tick."""
