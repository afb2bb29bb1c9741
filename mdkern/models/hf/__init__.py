"""Other people's models: cut at their output layer, probed, intercepted, asked for their facts."""
