"""python -m bench.round: a whole decoding round in one CUDA graph, and its share of an engine's round."""
