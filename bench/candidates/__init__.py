"""python -m bench.candidates."""
