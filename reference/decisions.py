"""Every decision the reference takes, with its margin, so that a comparison knows which ones fp32 may take otherwise.

    near tie:  margin <= 2^-17 * max(1, |key|);   margin of an arg-max = gap of its two best keys, of an acceptance = |ln(u q / p)|

Where a sum of probabilities decides (top_p), margins are shares of the whole sum, and a decision is near below 2^-19, the error of
such a sum in fp32. `flips` names decisions (request, ordinal) to take the other way, so that the reference can go on from the
alternative that a kernel took. Symbols: u acceptance uniform, p target probability, q draft probability. Source: the definition of
equality in docs/randomness.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 2.0**-17
# Probability that a margin is near: about twice its width (a log-uniform gap near 0 has density at most 1 on each side).
NEAR_PROBABILITY = 2 * NEAR
SUM_SCALE = 0.25  # of margins that are differences of sums


class Decision(NamedTuple):
    """How close a decision was: near a tie where margin <= NEAR * scale."""

    kind: str
    margin: float
    scale: float


class Decisions:
    """Record of the decisions of a call."""

    def __init__(self, flips: frozenset = frozenset()):
        self.flips = flips
        self.margins: dict[tuple[int, int], Decision] = {}  # by (request, ordinal)
        self._next: dict[int, int] = {}
        self.expected = 0.0  # number of near ties to expect

    @property
    def total(self) -> int:
        return len(self.margins)

    def near(self) -> list[tuple[int, int]]:
        """(request, ordinal) of the decisions whose margin is within the resolution of fp32."""
        return [where for where, decision in self.margins.items() if decision.margin <= NEAR * decision.scale]

    def flipped(self, request: int, kind: str, margin: float, scale: float, probability: float = NEAR_PROBABILITY) -> bool:
        """Record a decision; True where it is to be taken the other way. probability: that its margin is near."""
        ordinal = self._next.get(request, 0)
        self._next[request] = ordinal + 1
        self.margins[request, ordinal] = Decision(kind, margin, scale)
        self.expected += probability
        return (request, ordinal) in self.flips

    def pick(self, request: int, kind: str, keys: Tensor) -> int:
        """Index of the largest key; ties, -0.0 and 0.0 among them, go to the lowest index."""
        keys = keys + 0.0  # a copy: its largest key is removed below

        def first(value):
            return int(torch.argmax((keys == value).int()))

        largest = keys.max()
        best = first(largest)
        if keys.numel() == 1:
            return best
        keys[best] = -math.inf
        second = keys.max()
        best_key, runner_up = float(largest), float(second)
        if best_key == runner_up or math.isinf(best_key):
            margin = math.inf  # equal keys are equal in every precision, and an infinite key is not near any other
        else:
            margin = best_key - runner_up
        scale = max(1.0, abs(best_key)) if math.isfinite(best_key) else 1.0
        return first(second) if self.flipped(request, kind, margin, scale) else best

    def below(self, request: int, kind: str, uniform: float, denominator: float, numerator: float) -> bool:
        """uniform * denominator < numerator, strictly."""
        left = uniform * denominator
        below = left < numerator
        margin = abs(math.log(left / numerator)) if left > 0 and numerator > 0 else math.inf
        return below != self.flipped(request, kind, margin, 1.0)

    def prefix(self, request: int, kind: str, sums: Tensor, need: float) -> int:
        """Length of the shortest prefix whose sum (`sums`, ascending) reaches `need`: at least 1, at most all."""
        total, count = float(sums[-1]), sums.numel()
        length = min(int((sums < need).sum()) + 1, count)
        step = float(sums[length - 1]) - (float(sums[length - 2]) if length > 1 else 0.0)
        over = float(sums[length - 1]) - need if length < count else math.inf
        under = need - float(sums[length - 2]) if length > 1 else math.inf
        probability = min(1.0, 2 * NEAR * SUM_SCALE * total / step) if step > 0 else 1.0
        other = length + 1 if over < under else length - 1
        if self.flipped(request, kind, abs(min(over, under)) / total, SUM_SCALE, probability) and 1 <= other <= count:
            return other
        return length
