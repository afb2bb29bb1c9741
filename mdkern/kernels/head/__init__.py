"""The output layer: from rows of hidden states to tokens and statistics."""
