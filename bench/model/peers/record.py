"""What a step of a peer asks a GPU for: its launches, as they are compiled, and the torch ops around them, with their bytes.

The peer's own functions run on tensors without data (`torch.device("meta")`), so that grids, constants, types and strides are those
that it passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.shared.offline.capture import Launch, capture

# Ops that only make room, that read no more than they write, and that write without reading.
_FREE = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "_unsafe_view", "detach", "lift_fresh"}
_PICKS = {"embedding", "gather", "index", "index_select"}
_FILLS = {"fill_", "zero_", "copy_", "exponential_", "uniform_"}


class TorchOp(NamedTuple):
    """bytes: read and written once each; of one that picks rows or elements, what it picks."""

    name: str
    bytes: int


class Recorded(NamedTuple):
    launches: list[Launch]
    ops: list[TorchOp]


def record(step: Callable[[], object], arch: str) -> Recorded:
    """Run a step; its launches are compiled for `arch` and run nowhere."""
    ops = _Ops()
    with capture(arch, compiled=True) as launches, ops:
        step()
    return Recorded(launches, ops.found)


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found: list[TorchOp] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name not in _FREE and not view:
            self.found.append(TorchOp(name, _bytes(name, tree_leaves((args, kwargs)), tree_leaves(result))))
        return result


def _bytes(name: str, given: list, made: list) -> int:
    read = [_size(each) for each in given if isinstance(each, torch.Tensor)]
    written = sum(_size(each) for each in made if isinstance(each, torch.Tensor))
    if name in _PICKS:
        return 2 * written + sum(read) - max(read)
    if name in _FILLS:
        return written + sum(read[1:])
    return written + sum(read)


def _size(tensor: torch.Tensor) -> int:
    """Bytes that are there: an expanded tensor has fewer than its shape says."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.element_size() * int(torch.Size(sizes).numel())
