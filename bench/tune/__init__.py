"""python -m bench.tune: the launch configurations of a GPU, each with the measurement that justifies it."""
