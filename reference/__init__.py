"""The decoding round in plain PyTorch, in the words of the paper: the reference that every kernel is compared with."""
