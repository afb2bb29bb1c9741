"""What samples and models are worth: likelihoods, text statistics, and which steps need the heavy model."""
