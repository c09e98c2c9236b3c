"""A part of a round as a CUDA graph: the host then starts hundreds of kernels with one call.

What is captured must read and write the same memory in every call, and nothing on the host may depend on what the device computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Captured(Generic[T]):
    """`call`, made as it is the first time (which compiles and allocates), captured the second time, replayed from then on.

    Its result is then the same memory in every call. Where it cannot be captured it goes on as it is, and a warning says why.
    wanted: False = always as it is. reads: what makes the memory that this call reads; while that is not captured, this is not.
    """

    def __init__(self, call: Callable[[], T], wanted: bool, reads: Captured | None = None):
        self._call, self._wanted, self._reads = call, wanted, reads
        self._warm = False
        self._replay: Callable[[], object] | None = None

    def __call__(self) -> T:
        if self._wanted and self._warm and self._replay is None and (self._reads is None or self._reads.replays):
            self._capture()
        if self._replay is None:
            self._warm = True
            return self._call()
        self._replay()
        return self._result

    @property
    def replays(self) -> bool:
        return self._replay is not None

    def _capture(self) -> None:
        try:
            self._result, self._replay = capture(self._call)
        except RuntimeError as error:
            self._wanted = False
            warnings.warn(f"dspark: a round is not captured in a CUDA graph: {error}", stacklevel=6)


def possible(device: torch.device) -> bool:
    """Whether calls on this device can be captured."""
    return device.type == "cuda"


def capture(call: Callable[[], T]) -> tuple[T, Callable[[], object]]:
    """(what `call` returns, a function that does what it does); nothing has been computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return result, graph.replay
