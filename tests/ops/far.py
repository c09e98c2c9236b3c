"""Tensors whose rows lie so far apart that an offset in 32 bits wraps around."""

import mmap

import torch

# Linux's number; Python names it from 3.13 on. Pages that nobody touches then ask the machine for nothing.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def far_apart(tensor):
    """A copy of `tensor` [A, B, C] in which entry [a, 2, 0] lies more than 2^31 elements after entry [a, 0, 0]."""
    outer, middle, width = tensor.shape
    stride = 2**30 + 64
    elements = (middle - 1) * stride + outer * width
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = torch.frombuffer(mmap.mmap(-1, elements * tensor.element_size(), flags=flags), dtype=tensor.dtype)
    return memory.as_strided((outer, middle, width), (width, stride, 1)).copy_(tensor)
