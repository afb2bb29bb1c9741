"""Running a request: its arguments checked, its steps run eagerly or as CUDA graphs."""
