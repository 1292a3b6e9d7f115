"""A published benchmark and runs in, its scores with intervals and baselines out."""
