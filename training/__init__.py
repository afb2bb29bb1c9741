"""Training of the denoisers and of the autoregressive judge: a plain PyTorch loop, no framework."""

from mdkern.threads import wait_without_spinning

wait_without_spinning()
