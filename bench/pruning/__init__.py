"""python -m bench.pruning."""
