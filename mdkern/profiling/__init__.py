"""Where the time goes, and the samplers mdkern is compared with."""
