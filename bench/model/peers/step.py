"""A step of a peer: what it is compared with, how it is asked for, and what streams in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import NamedTuple

import torch

from bench.shared.cases.case import VOCAB

REQUESTS = (1, 8, 64)


class Stream(NamedTuple):
    """A kernel that streams rows of V logits.

    rows: of a launch, those whose programs leave at once not counted. loads: bytes per logit that a lane asks for at least, in each
    loop that streams. moves: bytes per logit between the chip and its memory, each once. tile(c): logits of a turn, or of a pass,
    from the constants of the launch. span: logits of a program; None = a tile.
    """

    rows: int
    loads: float
    moves: float
    tile: Callable[[Mapping[str, int]], float]
    span: int | None = None

    @property
    def logits(self) -> int:
        return self.rows * VOCAB


class Step(NamedTuple):
    """op, case: of bench/model/ops.py, the one of ours that does the same. path: which of the peer's ways. sampled: requests have
    a temperature, so that programs take the longest way; else the shortest that streams. run(modules): the peer's functions, on
    tensors without data. streams: by kernel, of its launches in order, the last one of all that follow. note: what is in the step,
    or is not, that a reader would not guess."""

    op: str
    case: str
    path: str
    sampled: bool
    run: Callable[[SimpleNamespace], object]
    streams: Mapping[str, tuple[Stream, ...]]
    note: str


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return empty(*shape, dtype=dtype)


def reals(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.float32)


def flat(*shape: int) -> torch.Tensor:
    """bf16 logits of ids: [..., V]."""
    return empty(*shape, VOCAB)
