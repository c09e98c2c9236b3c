"""python -m bench.load: scheduling policies under load, simulated from measured rounds."""
