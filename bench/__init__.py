"""Measurements: what kernels compile to, and whole decoding on real text (python -m bench.decode)."""
