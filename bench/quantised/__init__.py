"""python -m bench.quantised."""
