"""python -m bench.decode: ways of decoding on real text, side by side."""
