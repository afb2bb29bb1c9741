"""Measures of models and samples: likelihoods, statistics of text, and which steps need the heavy model."""
