"""Where random decisions come from: the rules are written over a source, so that Philox and exact enumeration run the same code.

    accept: u * denominator < numerator;   draw: arg-max over blocks of (ln of the block's sum + G), then inside it of (ln w + G)

Symbols: u acceptance uniform, G Gumbel noise, w weights, V vocabulary. Vocabulary blocks have 1024 ids (the package's streams
`LEAF` and `DRAFT_LEAF` address them). Source: the addressing is this project's (docs/randomness.md).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from dspark_kernels.types import Stream

from . import philox
from .decisions import Decisions

VOCAB_BLOCK = 1024


class Source(Protocol):
    """The random decisions of one request. `position` is the sequence position being decided; weights and log weights are fp64 [V].

    node: the slot of a draft tree that a decision belongs to; 0 in chains.
    """

    def accepts(self, position: int, denominator: float, numerator: float, node: int = 0) -> bool:
        """u * denominator < numerator for the acceptance uniform u of this position's draft."""

    def draw(self, position: int, weights: Tensor, node: int = 0) -> int:
        """A correction or bonus token, with probability proportional to its weight."""

    def coupled(self, position: int, log_weights: Tensor) -> int:
        """arg-max of log weight plus the noise that draft and target share at this position."""

    def draft(self, position: int, log_weights: Tensor, node: int = 0) -> int:
        """A draft token, with probability proportional to exp(log weight). Calls at one node use the same noise."""


class PhiloxSource:
    """The addressed noise of one request and anchor: what the kernels compute, in fp64, with every margin recorded."""

    def __init__(self, seed: int, anchor_position: int, decisions: Decisions | None = None, request: int = 0):
        self.seed, self.anchor_position = int(seed), int(anchor_position)
        self.decisions = Decisions() if decisions is None else decisions
        self.request = request

    def accepts(self, position: int, denominator: float, numerator: float, node: int = 0) -> bool:
        lane = torch.zeros(1, dtype=torch.int64)
        word = philox.words(self.seed, lane, position, self.anchor_position, Stream.ACCEPT, node)
        uniform = float(philox.uniform(word))
        return self.decisions.below(self.request, "accept", uniform, float(denominator), float(numerator))

    def draw(self, position: int, weights: Tensor, node: int = 0) -> int:
        return self._two_races(position, weights.log(), Stream.LEAF, Stream.CORRECT, node)

    def draft_by_block(self, position: int, log_weights: Tensor, node: int) -> int:
        """`draft` by the same two races."""
        return self._two_races(position, log_weights, Stream.DRAFT_LEAF, Stream.DRAFT, node)

    def _two_races(self, position: int, log_weights: Tensor, between: Stream, within: Stream, node: int) -> int:
        """Two races of exponential clocks: between vocabulary blocks by their sums, then inside the block that won."""
        blocks, device = -(-log_weights.numel() // VOCAB_BLOCK), log_weights.device
        padded = torch.full((blocks * VOCAB_BLOCK,), -math.inf, dtype=torch.float64, device=device)
        padded[: log_weights.numel()] = log_weights
        sums = torch.logsumexp(padded.view(blocks, VOCAB_BLOCK), 1)
        block = self._race(position, "block", sums, torch.arange(blocks, device=device), between, node)
        first = block * VOCAB_BLOCK
        inside = log_weights[first : first + VOCAB_BLOCK]
        ids = torch.arange(first, first + inside.numel(), device=device)
        return first + self._race(position, "token", inside, ids, within, node)

    def _race(self, position: int, kind: str, log_weights: Tensor, lanes: Tensor, stream: Stream, node: int) -> int:
        noise = philox.gumbel(self.seed, lanes, position, self.anchor_position, stream, node)
        return self.decisions.pick(self.request, kind, log_weights + noise)

    def coupled(self, position: int, log_weights: Tensor, lanes: Tensor | None = None) -> int:
        """lanes: the noise of each entry, where it is not its index."""
        # This address holds no anchor, so that draft and target use the same noise.
        lanes = torch.arange(log_weights.numel(), device=log_weights.device) if lanes is None else lanes
        noise = philox.gumbel(self.seed, lanes, position, 0, Stream.COUPLED)
        return self.decisions.pick(self.request, "coupled", log_weights + noise)

    def draft(self, position: int, log_weights: Tensor, node: int = 0, lanes: Tensor | None = None) -> int:
        """lanes: the noise of each entry, where it is not its index."""
        lanes = torch.arange(log_weights.numel(), device=log_weights.device) if lanes is None else lanes
        return self._race(position, "draft", log_weights, lanes, Stream.DRAFT, node)
