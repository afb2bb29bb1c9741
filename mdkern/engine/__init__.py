"""Runs a request: checks its arguments, then runs its steps, eagerly or as CUDA graphs."""
