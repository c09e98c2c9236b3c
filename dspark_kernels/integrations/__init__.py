"""Adapters to other engines and to torch.distributed, each imported on demand; none is imported with the package."""
