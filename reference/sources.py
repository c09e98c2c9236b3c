"""Where coins and draws come from: the rules are written over a source, so that Philox and exact enumeration run the same code."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from dspark_kernels.types import Stream

from . import philox
from .decisions import Decisions

LEAF = 1024


class Source(Protocol):
    """Chance for one request. `position` is the sequence position being decided; weights and log weights are fp64 [V].

    node: the slot of a draft tree that a coin or draw belongs to; 0 in chains.
    """

    def coin(self, position: int, denominator: float, numerator: float, node: int = 0) -> bool:
        """u * denominator < numerator for the uniform u of this position's draft."""

    def draw(self, position: int, weights: Tensor, node: int = 0) -> int:
        """A correction or bonus token, with chance proportional to its weight."""

    def coupled(self, position: int, log_weights: Tensor) -> int:
        """arg-max of log weight plus the noise that draft and target share at this position."""

    def draft(self, position: int, log_weights: Tensor, node: int = 0) -> int:
        """A draft token, with chance proportional to exp(log weight). Calls at one node meet the same noise."""


class PhiloxSource:
    """The addressed noise of one request and anchor: what the kernels compute, in fp64, with every margin recorded."""

    def __init__(self, seed: int, anchor_position: int, decisions: Decisions | None = None, request: int = 0):
        self.seed, self.anchor_position = int(seed), int(anchor_position)
        self.decisions = Decisions() if decisions is None else decisions
        self.request = request

    def coin(self, position: int, denominator: float, numerator: float, node: int = 0) -> bool:
        lane = torch.zeros(1, dtype=torch.int64)
        word = philox.words(self.seed, lane, position, self.anchor_position, Stream.ACCEPT, node)
        coin = float(philox.uniform(word))
        return self.decisions.below(self.request, "coin", coin, float(denominator), float(numerator))

    def draw(self, position: int, weights: Tensor, node: int = 0) -> int:
        return self._two_races(position, weights.log(), Stream.LEAF, Stream.CORRECT, node)

    def draft_by_leaf(self, position: int, log_weights: Tensor, node: int) -> int:
        """`draft` by the same two races."""
        return self._two_races(position, log_weights, Stream.DRAFT_LEAF, Stream.DRAFT, node)

    def _two_races(self, position: int, log_weights: Tensor, between: Stream, within: Stream, node: int) -> int:
        """Two races of exponential clocks: between leaves of 1024 ids by their sums, then inside the winning leaf."""
        leaves, device = -(-log_weights.numel() // LEAF), log_weights.device
        padded = torch.full((leaves * LEAF,), -math.inf, dtype=torch.float64, device=device)
        padded[: log_weights.numel()] = log_weights
        sums = torch.logsumexp(padded.view(leaves, LEAF), 1)
        leaf = self._race(position, "leaf", sums, torch.arange(leaves, device=device), between, node)
        inside = log_weights[leaf * LEAF : (leaf + 1) * LEAF]
        ids = torch.arange(leaf * LEAF, leaf * LEAF + inside.numel(), device=device)
        return leaf * LEAF + self._race(position, "token", inside, ids, within, node)

    def _race(self, position: int, kind: str, log_weights: Tensor, lanes: Tensor, stream: Stream, node: int) -> int:
        noise = philox.gumbel(self.seed, lanes, position, self.anchor_position, stream, node)
        return self.decisions.pick(self.request, kind, log_weights + noise)

    def coupled(self, position: int, log_weights: Tensor, lanes: Tensor | None = None) -> int:
        """lanes: the noise of each entry, where it is not its index."""
        # No anchor in this address: draft and target meet the same noise on purpose.
        lanes = torch.arange(log_weights.numel(), device=log_weights.device) if lanes is None else lanes
        noise = philox.gumbel(self.seed, lanes, position, 0, Stream.COUPLED)
        return self.decisions.pick(self.request, "coupled", log_weights + noise)

    def draft(self, position: int, log_weights: Tensor, node: int = 0, lanes: Tensor | None = None) -> int:
        """lanes: the noise of each entry, where it is not its index."""
        lanes = torch.arange(log_weights.numel(), device=log_weights.device) if lanes is None else lanes
        return self._race(position, "draft", log_weights, lanes, Stream.DRAFT, node)
