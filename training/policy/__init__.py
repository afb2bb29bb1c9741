"""Training of `mdkern.decoders.Learned`: states from runs of a model, networks, and improvement in use."""
