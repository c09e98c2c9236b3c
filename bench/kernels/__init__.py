"""python -m bench.kernels: time every op beside its floor, plain PyTorch and installed engines."""
