"""python -m bench.inspect."""
