"""python -m bench.gpu: everything that needs a GPU, most important first, within a time budget."""
