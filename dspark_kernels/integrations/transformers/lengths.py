"""Texts of unequal lengths for functions of transformers that take a batch of one length.

Logits processors and stopping criteria see a whole text [B, length] and may look at its length and at a row's place in the batch. So
they are called once for each length that some row has, and each row's result is taken from the call of its own length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Prefix(NamedTuple):
    """A length, and the rows that have it.

    length: columns of the texts. steps: int64 [n], which of its own prefixes each row contributes, counted from its shortest. rows:
    int64 [n].
    """

    length: int
    rows: Tensor
    steps: Tensor


def prefixes(shortest: list[int], counts: list[int], device) -> Iterator[Prefix]:
    """All prefixes of all rows, by length: row b has counts[b] of them, of shortest[b] columns and up."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row, (first, count) in enumerate(zip(shortest, counts, strict=True)):
        for step in range(count):
            rows, steps = found.setdefault(first + step, ([], []))
            rows.append(row)
            steps.append(step)
    for length in sorted(found):
        yield Prefix(length, *(torch.tensor(part, device=device) for part in found[length]))


def process(processors: list, logits: Tensor, texts: Tensor, filled: list[int], alive: list[bool]) -> Tensor:
    """Run logits processors on the rows of a pass.

    logits: [B, n, V]; row i of request b follows the first filled[b] + i columns of texts [B, columns]. Rows that are not alive keep
    their logits. Returns fp32 [B, n, V].
    """
    result = logits.float().clone()
    counts = [logits.shape[1] * row for row in alive]
    for length, rows, steps in prefixes(filled, counts, logits.device):
        scores = torch.zeros_like(result[:, 0])
        scores[rows] = logits[rows, steps].float()
        ids = texts[:, :length]
        for processor in processors:
            scores = processor(ids, scores)
        result[rows, steps] = scores[rows]
    return result
