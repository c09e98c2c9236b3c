"""python -m bench.model: what every hot kernel costs, from what it compiles to, without a GPU."""
