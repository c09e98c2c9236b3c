"""The decoding round in plain PyTorch, in the words of the paper: the oracle that every kernel is compared with."""
