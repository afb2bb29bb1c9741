"""Measures where the time goes, and has the samplers that mdkern is compared with."""
