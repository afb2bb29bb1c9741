"""The output layer: hidden rows to tokens and statistics."""
