"""Random tensors from a seed, and the arguments of a call as a dictionary: what the cases of every op share.

    value = round(scale * N(0, 1) / grid) * grid

Symbols: R requests.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


class Case:
    """Base of the dataclasses that hold the arguments of one call of an op."""

    def arguments(self) -> dict:
        """The arguments by name, for op(**case.arguments())."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape, scale=1.0, dtype=torch.float32, grid=None) -> Tensor:
    """Normal values in `dtype`; with `grid`, multiples of it (a dyadic grid makes sums exact and ties frequent)."""
    x = torch.randn(*shape, generator=g) * scale
    if grid is not None:
        x = (x / grid).round() * grid
    return x.to(dtype)


def slot_map(seed: int, requests: int, padding: int = 0) -> Tensor:
    """int32 [R]: distinct slots of R + 3 in shuffled order, the last `padding` rows -1."""
    slots = torch.randperm(requests + 3, generator=generator(seed))[:requests].to(torch.int32)
    if padding:
        slots[requests - padding :] = -1
    return slots
