"""Training of the denoisers and of the autoregressive judge: a plain PyTorch loop, no framework."""
