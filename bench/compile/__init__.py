"""python -m bench.compile: what each kernel compiles to on each architecture, without a GPU."""
