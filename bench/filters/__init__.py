"""python -m bench.filters."""
