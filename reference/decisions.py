"""Every decision the reference takes, with its margin, so that a comparison knows which ones fp32 may take otherwise.

A near tie has margin <= 2^-17 * max(1, |key|): an arg-max by the gap of its two best keys, a coin by |ln(u q / p)|. `flips` names
decisions (request, ordinal) to take the other way, so that the reference can go on from the alternative a kernel took.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEAR = 2.0**-17


class Decisions:
    """Record of the decisions of a call."""

    def __init__(self, flips: frozenset = frozenset()):
        self.flips = flips
        self.margins: dict[tuple[int, int], tuple[str, float, float]] = {}
        self._next: dict[int, int] = {}

    @property
    def total(self) -> int:
        return len(self.margins)

    def near(self) -> list[tuple[int, int]]:
        """(request, ordinal) of the decisions whose margin is within the resolution of fp32."""
        return [where for where, (_, margin, scale) in self.margins.items() if margin <= NEAR * scale]

    def _record(self, request: int, kind: str, margin: float, scale: float) -> bool:
        """Note a decision; True where it is to be taken the other way."""
        ordinal = self._next.get(request, 0)
        self._next[request] = ordinal + 1
        self.margins[request, ordinal] = (kind, margin, scale)
        return (request, ordinal) in self.flips

    def pick(self, request: int, kind: str, keys: Tensor) -> int:
        """Index of the largest key; ties, -0.0 and 0.0 among them, go to the lowest index."""
        keys = keys + 0.0
        best = int(torch.argmax((keys == keys.max()).int()))
        if keys.numel() == 1:
            return best
        others = keys.clone()
        others[best] = -math.inf
        second = int(torch.argmax((others == others.max()).int()))
        top, runner_up = float(keys[best]), float(others[second])
        if top == runner_up or math.isinf(top):
            margin = math.inf  # equal keys are equal in every precision, and an infinite key has no rival
        else:
            margin = top - runner_up
        scale = max(1.0, abs(top)) if math.isfinite(top) else 1.0
        return second if self._record(request, kind, margin, scale) else best

    def below(self, request: int, kind: str, coin: float, denominator: float, numerator: float) -> bool:
        """coin * denominator < numerator, strictly."""
        left = coin * denominator
        verdict = left < numerator
        margin = abs(math.log(left / numerator)) if left > 0 and numerator > 0 else math.inf
        return verdict != self._record(request, kind, margin, 1.0)
