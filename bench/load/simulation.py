"""The simulation of bench.load: policies that choose lengths, and rounds drawn for N requests that decode all the time.

A policy sees the confidences of a step and gives lengths; a run is what was emitted and what it cost, step by step.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.scheduling import ConfidenceHistory, plan_budget, plan_lengths
from dspark_kernels.types import CostTable, DraftBlock, OneHotProposal
from reference.schedule import COST_LIMIT, COST_UNITS_PER_SECOND, StepCost, threshold_lengths

LAG = 2  # rounds between a confidence and the budget made of it
MEAN_TOKENS = 256  # of a request, geometric
WARM = 10  # steps that are not counted: until every slot has a history
BATCHES = 20  # of steps, for standard errors


class Policy:
    """Chooses lengths. One instance serves one simulation."""

    drafting = True

    def __init__(self, name: str):
        self.name = name

    def start(self, requests: int, drafts: int, table: CostTable) -> None:
        """Before the first step."""

    def reset(self, slots: Sequence[int]) -> None:
        """New requests are in these slots."""

    def lengths(self, confidence: Tensor) -> Tensor:
        """Drafts to verify per request [N], from this round's calibrated confidences fp32 [N, K]."""
        raise NotImplementedError


class Fixed(Policy):
    def __init__(self, length: int):
        super().__init__(f"fixed-{length}" if length else "none")
        self.length, self.drafting = length, length > 0

    def lengths(self, confidence):
        return torch.full(confidence.shape[:1], min(self.length, confidence.shape[1]))


class Threshold(Policy):
    def __init__(self, threshold: float):
        super().__init__(f"threshold-{threshold:g}")
        self.threshold = threshold

    def lengths(self, confidence):
        return threshold_lengths(confidence, self.threshold)


class Causal(Policy):
    def __init__(self, bypass: float | None = None, convex: bool = False):
        super().__init__("causal-convex" if convex else "causal")
        self.bypass, self.convex = bypass, convex

    def start(self, requests, drafts, table):
        self.table = convex_below(table, requests) if self.convex else table

    def lengths(self, confidence):
        return plan_lengths(confidence, self.table, bypass=self.bypass)


class Budget(Policy):
    def __init__(self, bypass: float | None = None):
        super().__init__("budget")
        self.bypass = bypass

    def start(self, requests, drafts, table):
        self.table, self.history = table, ConfidenceHistory(requests, drafts, "cpu", lag=LAG)
        self._shared = torch.zeros(requests, drafts, dtype=torch.int64), OneHotProposal(), torch.zeros(requests, dtype=torch.int32)

    def reset(self, slots):
        self.history.reset(slots)

    def lengths(self, confidence):
        budget = plan_budget(self.history.on_host(), self.table, bypass=self.bypass)
        lengths = plan_lengths(confidence, self.table, policy="budget", budget=budget, bypass=self.bypass)
        self.history.record(DraftBlock(*self._shared, confidence=confidence))
        self.history.send()
        return lengths


def convex_below(table: CostTable, first: int) -> CostTable:
    """The largest convex curve that is nowhere above the table from entry `first` on (entries before it are copied).

    With survivals in descending order, tau is concave in the number of drafts; over a convex cost, tau / cost then rises to its
    maximum and falls after it, and "stop at the first draft that does not pay" finds that maximum. The curve comes from the table
    alone, so the policy stays lossless.
    """
    seconds = table.seconds.double().tolist()
    if first >= len(seconds):
        return table
    corners: list[int] = []
    for at in range(first, len(seconds)):
        while len(corners) > 1:
            left, middle = corners[-2:]
            if (seconds[middle] - seconds[left]) * (at - left) < (seconds[at] - seconds[left]) * (middle - left):
                break
            corners.pop()
        corners.append(at)
    whole = np.arange(first, len(seconds))
    curve = np.interp(whole, corners, [seconds[at] for at in corners])
    # fp32 rounds up as often as down, and a curve above its table by one bit would be no harm, but no lower bound either.
    curve = np.minimum(curve.astype(np.float32), table.seconds[first:].numpy())
    return dataclasses.replace(table, seconds=torch.cat([table.seconds[:first], torch.from_numpy(curve)]))


def policy_of(name: str, bypass: float | None) -> Policy:
    """Raises BadArgument."""
    if name == "none":
        return Fixed(0)
    if re.fullmatch(r"fixed-[1-9]\d*", name):
        return Fixed(int(name.removeprefix("fixed-")))
    if name.startswith("threshold-"):
        return Threshold(float(name.removeprefix("threshold-")))
    return {"causal": Causal(bypass), "causal-convex": Causal(bypass, convex=True), "budget": Budget(bypass)}[name]


@dataclasses.dataclass(frozen=True)
class Source:
    """Rounds to draw from, one domain after another: confidence fp32 [M, K], accepted int64 [M], first int64 [domains+1]."""

    confidence: Tensor
    accepted: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, rounds: Sequence[tuple[Tensor, Tensor]]) -> Source:
        """From (confidence [N, K], accepted [N]) of each domain."""
        first = np.cumsum([0, *(len(accepted) for _, accepted in rounds)])
        return cls(torch.cat([c for c, _ in rounds]), torch.cat([a for _, a in rounds]).numpy(), first)

    @property
    def drafts(self) -> int:
        return self.confidence.shape[1]


@dataclasses.dataclass(frozen=True)
class Draws:
    """All random numbers of a simulation, the same for every policy.

    pick: fp64 [steps, N], which round a slot draws; domain, length: [N, requests], of the requests that come into a slot, in turn.
    """

    pick: np.ndarray
    domain: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, seed: int, steps: int, requests: int, mix: float, mean_tokens: float = MEAN_TOKENS) -> Draws:
        random = np.random.default_rng([seed, requests])
        # At most one request ends in a slot per step.
        shape = (requests, steps + 1)
        domain = (random.random(shape) >= mix).astype(np.int64)
        return cls(random.random((steps, requests)), domain, random.geometric(1 / mean_tokens, shape))


@dataclasses.dataclass(frozen=True)
class Run:
    """What happened, step by step: tokens, seconds, verified drafts, int64 or fp64 [steps]; N requests."""

    policy: str
    requests: int
    tokens: np.ndarray
    seconds: np.ndarray
    verified: np.ndarray

    def batches(self, values: np.ndarray) -> np.ndarray:
        """Sums over BATCHES runs of consecutive steps (fewer where there are fewer steps)."""
        return np.array([part.sum() for part in np.array_split(values, min(BATCHES, len(values)))], dtype=np.float64)

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        return jackknife(lambda t, s: t / s, self.batches(self.tokens), self.batches(self.seconds))

    @property
    def tokens_per_round(self) -> tuple[float, float]:
        rounds = self.batches(np.full(len(self.tokens), self.requests))
        return jackknife(lambda t, r: t / r, self.batches(self.tokens), rounds)

    @property
    def verified_per_round(self) -> float:
        return float(self.verified.mean()) / self.requests

    @property
    def rows_per_step(self) -> float:
        return self.requests + float(self.verified.mean())

    def gain_over(self, other: Run) -> tuple[float, float]:
        """By how many percent more tokens per second than `other`, batch against batch of the same draws."""
        parts = [run.batches(values) for run in (self, other) for values in (run.tokens, run.seconds)]
        return jackknife(lambda t, s, u, r: 100 * (t / s / (u / r) - 1), *parts)


def jackknife(statistic: Callable[..., float], *sums: np.ndarray) -> tuple[float, float]:
    """A function of totals and its standard error, from leaving out one batch at a time. NaN for a single batch."""
    count, totals = len(sums[0]), [values.sum() for values in sums]
    if count < 2:
        return float(statistic(*totals)), math.nan
    without = np.array([statistic(*(t - v[i] for t, v in zip(totals, sums, strict=True))) for i in range(count)])
    return float(statistic(*totals)), float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))


def simulate(policy: Policy, source: Source, draws: Draws, table: CostTable, warm: int = WARM) -> Run:
    """Run every step of `draws`; the first `warm` are not in the result. table: on the CPU."""
    steps, requests = draws.pick.shape
    policy.start(requests, source.drafts, table)
    cost = StepCost(table, requests if policy.drafting else 0)  # the same integers that scheduling reads
    slots, turn = np.arange(requests), np.zeros(requests, dtype=np.int64)
    domain, left = draws.domain[:, 0].copy(), draws.length[:, 0].copy()
    size = np.diff(source.first)
    tokens, units, verified = (np.zeros(steps, dtype=np.int64) for _ in range(3))
    policy.reset(slots.tolist())
    for step in range(steps):
        drawn = source.first[domain] + (draws.pick[step] * size[domain]).astype(np.int64)
        lengths = policy.lengths(source.confidence[torch.from_numpy(drawn)]).numpy()
        emitted = np.minimum(source.accepted[drawn], lengths) + 1
        tokens[step], verified[step] = emitted.sum(), lengths.sum()
        units[step] = cost(requests + int(verified[step]))
        left -= emitted
        ended = slots[left <= 0]
        if len(ended):
            turn[ended] += 1
            domain[ended], left[ended] = draws.domain[ended, turn[ended]], draws.length[ended, turn[ended]]
            policy.reset(ended.tolist())
    if units.max() >= COST_LIMIT:
        limit = COST_LIMIT / COST_UNITS_PER_SECOND
        raise ValueError(f"expected steps below {limit:.2f} s, which is all that a table can tell, got more at {requests} requests")
    return Run(policy.name, requests, tokens[warm:], units[warm:] / COST_UNITS_PER_SECOND, verified[warm:])


def steps_for(requests: int) -> int:
    """Counted steps by default: 20000 rounds of requests, in 100 to 2000 steps."""
    return min(2000, max(100, 20000 // requests))
