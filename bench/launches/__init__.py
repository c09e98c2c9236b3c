"""python -m bench.launches."""
