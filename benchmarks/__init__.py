"""Benchmarks, each a module to be run by pytest or by itself."""

from mdkern.threads import wait_without_spinning

wait_without_spinning()
