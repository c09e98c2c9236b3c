"""Tensors in dataclasses in dictionaries: change, count, overwrite and compare all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


def mapped(value, change: Callable[[Tensor], Tensor]):
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, change) for part in value)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{f.name: mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    return value


def tensors(value) -> list[Tensor]:
    found = []
    mapped(value, lambda tensor: found.append(tensor) or tensor)
    return found


def nbytes(value) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def poison(value) -> None:
    """Overwrite every tensor with what no op writes: NaN, -77777, True."""
    for tensor in tensors(value):
        tensor.fill_(float("nan") if tensor.is_floating_point() else True if tensor.dtype == torch.bool else -77777)


def same(have, want) -> bool:
    """Whether two structures hold the same bits."""
    pairs = zip(tensors(have), tensors(want), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
