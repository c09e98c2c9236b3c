"""P-values of counts under a known distribution, and the bias that they would have shown.

    chi-square   X = sum (O_i - E_i)^2 / E_i,   mean d, variance 2 d + (sum 1 / p_i - k^2 - 2 k + 2) / N, d = k - 1
    G            G = 2 sum O_i ln(O_i / E_i) / (1 + (sum 1 / p_i - 1) / (6 N d))              (Williams' correction)

G is compared with chi-square of d degrees, whose tail is the regularised incomplete gamma function Q(d / 2, x / 2); X with the
gamma distribution of its exact mean and variance. Cells that are too rare are made one. Power: under another distribution with
differences delta_i the statistic is noncentral chi-square with lambda = N sum delta_i^2 / p_i, and by Cauchy's inequality lambda >=
4 N TV^2 whatever the differences look like. Rare events: Poisson. Symbols: O observed and E = N p expected counts of k cells, N
samples, TV total variation. References: exact sums and simulation (tests/package/test_testing_statistics.py). Sources: Pearson
1900; Haldane 1937 (variance); Williams 1976.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST, FEWEST_SQUARE = 10.0, 100.0  # expected counts; below, the tails are not those of the formulas
# Observed counts, probabilities, samples, degrees of freedom -> the statistic and its p-value.
Statistic = Callable[[Tensor, Tensor, float, int], tuple[float, float]]
CERTAIN = 0.999  # probability with which a bias of the stated size is detected


class Finding(NamedTuple):
    """p_value: of the statistic if all is right. sees: total variation detected with probability CERTAIN, None if unknown."""

    what: str
    p_value: float
    sees: float | None = None


def _upper(shape: Tensor | float, x: float) -> Tensor:
    """P(Gamma(shape, 1) > x)."""
    probs: Tensor = torch.special.gammaincc(torch.as_tensor(shape, dtype=torch.float64), torch.as_tensor(x, dtype=torch.float64))
    return probs


def compare(what: str, observed: Tensor, probs: Tensor, level: float) -> list[Finding]:
    """Counts [k] against probabilities [k]: chi-square and G, and the bias that would have been seen at `level`.

    A count where the distribution is 0 is a p-value of 0.
    """
    observed, probs = observed.double().flatten(), probs.double().flatten()
    if impossible := int(observed[probs <= 0].sum()):
        return [Finding(f"{what}: {impossible} impossible outcomes", 0.0)] * 2
    return [
        _finding(f"{what}: {name}", test, *_merged(observed, probs, fewest), level)
        for name, test, fewest in (("chi-square", _square, FEWEST_SQUARE), ("G", _likelihood, FEWEST))
    ]


def _merged(observed: Tensor, probs: Tensor, fewest: float) -> tuple[Tensor, Tensor]:
    """The same with cells of fewer than `fewest` expected counts made one, and that one joined to the next if it is as rare."""
    total = float(observed.sum())
    probs, order = probs.sort(descending=True)
    observed = observed[order]
    kept = int((probs * total >= fewest).sum())
    kept -= 0 if float(probs[kept:].sum()) * total >= fewest else 1
    if kept < 1:
        return observed.sum()[None], probs.sum()[None]

    def join(x: Tensor) -> Tensor:
        return torch.cat([x[:kept], x[kept:].sum()[None]])

    return join(observed), join(probs)


def _finding(what: str, test: Statistic, observed: Tensor, probs: Tensor, level: float) -> Finding:
    degrees, total = len(probs) - 1, float(observed.sum())
    if degrees < 1:
        return Finding(f"{what}: too few samples", 1.0)
    value, p_value = test(observed, probs, total, degrees)
    return Finding(f"{what} {value:.0f} at {degrees} degrees", p_value, smallest_bias(degrees, total, level))


def _square(observed: Tensor, probs: Tensor, total: float, degrees: int) -> tuple[float, float]:
    value = float(((observed - probs * total) ** 2 / (probs * total)).sum())
    cells = degrees + 1
    variance = max(2 * degrees + (float((1 / probs).sum()) - cells**2 - 2 * cells + 2) / total, degrees)
    return value, float(_upper(degrees**2 / variance, value * degrees / variance))


def _likelihood(observed: Tensor, probs: Tensor, total: float, degrees: int) -> tuple[float, float]:
    value = 2 * float(torch.special.xlogy(observed, observed / (probs * total)).sum())
    value /= 1 + (float((1 / probs).sum()) - 1) / (6 * total * degrees)
    return value, float(_upper(degrees / 2, max(value, 0.0) / 2))


def power(degrees: int, shift: float, threshold: float) -> float:
    """P(noncentral chi-square > threshold): a Poisson mixture of central ones, P = sum_j Poisson(j; shift/2) Q(d/2 + j, t/2)."""
    mean = shift / 2
    terms = torch.arange(int(mean + 12 * math.sqrt(mean) + 40), dtype=torch.float64)
    weights = torch.exp(terms * math.log(mean) - mean - torch.lgamma(terms + 1)) if mean > 0 else (terms == 0).double()
    return float((weights * _upper(degrees / 2 + terms, threshold / 2)).sum())


@functools.cache
def threshold(degrees: int, level: float) -> float:
    """Chi-square value with probability `level` above it."""
    return _bisect(lambda x: float(_upper(degrees / 2, x / 2)) < level, 10.0 * degrees + 400)


@functools.cache
def smallest_bias(degrees: int, samples: float, level: float) -> float:
    """Total variation that is detected with probability CERTAIN, whatever the bias looks like."""
    limit = threshold(degrees, level)
    shift = _bisect(lambda x: power(degrees, x, limit) >= CERTAIN, 40.0 * degrees + 2000)
    return math.sqrt(shift / (4 * samples))


def _bisect(holds: Callable[[float], bool], high: float) -> float:
    """Least x in (0, high) from which on a monotone condition holds."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def rare(what: str, count: int, expected: float) -> Finding:
    """A count of rare events against its mean, Poisson, both sides."""
    fewer = float(_upper(count + 1, expected))
    more = float(torch.special.gammainc(torch.tensor(float(count)).double(), torch.tensor(expected).double())) if count else 1.0
    return Finding(f"{what}: {count} times, expected {expected:.1f}", min(1.0, 2 * min(fewer, more)))


def at_least(what: str, mean: float, expected: float, deviation: float, samples: int) -> Finding:
    """A mean of many against what it has to reach, one side, normal."""
    error = (mean - expected) / (deviation / math.sqrt(samples)) if deviation > 0 else math.copysign(99, mean - expected + 1e-9)
    return Finding(f"{what}: {mean:.4f}, expected {expected:.4f}", 0.5 * math.erfc(-error / math.sqrt(2)))
