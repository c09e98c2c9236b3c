"""Every decision the reference takes, with its margin, so that a comparison knows which ones fp32 may take otherwise.

A near tie has margin <= 2^-17 * max(1, |key|): an arg-max by the gap of its two best keys, a coin by |ln(u q / p)|. Where a sum of
probabilities decides (top_p), margins are shares of the whole mass and near below 2^-19, the error of a sum in fp32. `flips`
names decisions (request, ordinal) to take the other way, so that the reference can go on from the alternative a kernel took.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEAR = 2.0**-17
# The chance that a margin is near: about twice its width (a log-uniform gap near 0 has density at most 1 on each side).
CHANCE = 2 * NEAR
SUM_SCALE = 0.25  # of margins that are differences of sums


class Decisions:
    """Record of the decisions of a call."""

    def __init__(self, flips: frozenset = frozenset()):
        self.flips = flips
        self.margins: dict[tuple[int, int], tuple[str, float, float]] = {}
        self._next: dict[int, int] = {}
        self.expected = 0.0  # number of near ties that chance gives

    @property
    def total(self) -> int:
        return len(self.margins)

    def near(self) -> list[tuple[int, int]]:
        """(request, ordinal) of the decisions whose margin is within the resolution of fp32."""
        return [where for where, (_, margin, scale) in self.margins.items() if margin <= NEAR * scale]

    def flipped(self, request: int, kind: str, margin: float, scale: float, chance: float = CHANCE) -> bool:
        """Note a decision; True where it is to be taken the other way."""
        ordinal = self._next.get(request, 0)
        self._next[request] = ordinal + 1
        self.margins[request, ordinal] = (kind, margin, scale)
        self.expected += chance
        return (request, ordinal) in self.flips

    def pick(self, request: int, kind: str, keys: Tensor) -> int:
        """Index of the largest key; ties, -0.0 and 0.0 among them, go to the lowest index."""
        keys = keys + 0.0  # a copy, which loses its best below

        def first(value):
            return int(torch.argmax((keys == value).int()))

        largest = keys.max()
        best = first(largest)
        if keys.numel() == 1:
            return best
        keys[best] = -math.inf
        second = keys.max()
        top, runner_up = float(largest), float(second)
        if top == runner_up or math.isinf(top):
            margin = math.inf  # equal keys are equal in every precision, and an infinite key has no rival
        else:
            margin = top - runner_up
        scale = max(1.0, abs(top)) if math.isfinite(top) else 1.0
        return first(second) if self.flipped(request, kind, margin, scale) else best

    def below(self, request: int, kind: str, coin: float, denominator: float, numerator: float) -> bool:
        """coin * denominator < numerator, strictly."""
        left = coin * denominator
        verdict = left < numerator
        margin = abs(math.log(left / numerator)) if left > 0 and numerator > 0 else math.inf
        return verdict != self.flipped(request, kind, margin, 1.0)

    def prefix(self, request: int, kind: str, sums: Tensor, need: float) -> int:
        """Length of the shortest prefix whose sum (`sums`, ascending) reaches `need`: at least 1, at most all."""
        total, count = float(sums[-1]), sums.numel()
        length = min(int((sums < need).sum()) + 1, count)
        step = float(sums[length - 1]) - (float(sums[length - 2]) if length > 1 else 0.0)
        over = float(sums[length - 1]) - need if length < count else math.inf
        under = need - float(sums[length - 2]) if length > 1 else math.inf
        chance = min(1.0, 2 * NEAR * SUM_SCALE * total / step) if step > 0 else 1.0
        other = length + 1 if over < under else length - 1
        if self.flipped(request, kind, abs(min(over, under)) / total, SUM_SCALE, chance) and 1 <= other <= count:
            return other
        return length
