"""Measurements: what kernels compile to and take, whole decoding on real text, scheduling under load.

Every entry of this folder but two is a command: `python -m bench.decode`. Its helpers live with it; what several commands use is in
`shared`, the embedded models and the command that builds them are in `assets` (tests/bench/test_imports.py).
"""
