"""How a vocabulary is cut over ranks, and how a rank's part of a result is laid out in one tensor.

Rank i of N holds ids i * W .. (i + 1) * W - 1 of V <= N * W, W the columns of its logits on every rank (the last ranks' may lie
beyond V). A part is one int64 tensor of the same size on every rank, so that the engine gathers it with one collective.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_int, check_tensor
from ..workspace import words_of

Field = tuple[torch.dtype, tuple[int, ...]]  # a region's dtype and shape


class Shard(NamedTuple):
    """start: first id of this rank; width: ids per rank; count: ranks; vocab: ids in all."""

    start: int
    width: int
    count: int  # type: ignore[assignment]  # instead of tuple's method, which nobody calls
    vocab: int

    @property
    def held(self) -> int:
        """Number of vocabulary ids that this rank has: its first columns."""
        return max(0, min(self.width, self.vocab - self.start))

    def blocks(self, size: int) -> int:
        """Largest number of aligned blocks of `size` ids that any rank's ids touch."""
        whole = self.width // size
        return whole if self.width % size == 0 else (self.width + size - 2) // size + 1

    def pieces(self, size: int) -> int:
        """Largest number of ranks that share a block of `size` ids."""
        return 1 if self.width % size == 0 else min(self.count, -(-(size - 1) // self.width) + 1)


def check_shard(width: int, vocab_start: int, vocab_shards: int, vocab_size: int | None) -> Shard:
    """The cut that a rank with `width` columns is part of."""
    check_int("vocab_shards", vocab_shards, low=1)
    vocab_size = width * vocab_shards if vocab_size is None else check_int("vocab_size", vocab_size, low=1)
    if vocab_size > width * vocab_shards:
        raise ValueError(f"vocab_size: expected at most {vocab_shards} shards x {width} columns, got {vocab_size}")
    check_int("vocab_start", vocab_start, low=0, high=width * (vocab_shards - 1))
    if vocab_start % width:
        raise ValueError(f"vocab_start: expected a multiple of the {width} columns of a shard, got {vocab_start}")
    return Shard(vocab_start, width, vocab_shards, vocab_size)


class Fields:
    """Named regions of a part, each at a multiple of 16 bytes: name -> (dtype, shape)."""

    def __init__(self, **fields: Field) -> None:
        self._fields: dict[str, tuple[int, torch.dtype, int]] = {}  # where a region begins, its dtype, its elements
        self.names, self.words = tuple(fields), 0
        for name, (dtype, shape) in fields.items():
            count = 1
            for size in shape:
                count *= size
            self._fields[name] = (self.words, dtype, count)
            self.words += words_of(count, dtype)

    def view(self, part: Tensor, name: str) -> Tensor | None:
        """Region `name` of a part [words], or of gathered parts [ranks, words]; None where parts have no such region."""
        if name not in self._fields:
            return None
        start, dtype, count = self._fields[name]
        region = part[..., start : start + words_of(count, dtype)]
        return region if dtype == torch.int64 else region.view(dtype)

    def count(self, name: str) -> int:
        """Elements of region `name`."""
        return self._fields[name][2]

    def check_part(self, part: Tensor | None, device: torch.device) -> Tensor:
        """The caller's part, checked, or a new one."""
        if part is None:
            return torch.empty(self.words, dtype=torch.int64, device=device)
        return check_tensor("out", part, dtype=torch.int64, shape=(self.words,), device=device, contiguous=True)

    def check_gathered(self, name: str, gathered: Tensor, shard: Shard, device: torch.device) -> Tensor:
        shape = (shard.count, self.words)
        return check_tensor(name, gathered, dtype=torch.int64, shape=shape, device=device, contiguous=True)
