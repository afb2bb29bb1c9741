"""Models of transformers and of code written for it: how they are split at their output layer."""
