"""dspark_kernels.testing.statistics: tails against tables and exact sums, power against simulation."""

import math

import pytest
import torch

from dspark_kernels.testing import statistics, suite


@pytest.mark.parametrize(
    "degrees, probability, quantile", [(1, 0.05, 3.841459), (10, 0.05, 18.307038), (26, 0.001, 54.051962), (80, 0.01, 112.328793)]
)
def test_threshold_is_the_quantile_of_the_tables(degrees, probability, quantile):
    assert statistics.threshold(degrees, probability) == pytest.approx(quantile, rel=1e-6)


def test_power_of_no_difference_is_the_level():
    limit = statistics.threshold(26, 1e-4)
    assert statistics.power(26, 0.0, limit) == pytest.approx(1e-4, rel=1e-6)
    # Noncentral chi-square by simulation: one normal of mean sqrt(40) among 26.
    normals = torch.randn(200_000, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    normals[:, 0] += math.sqrt(40.0)
    share = float(((normals**2).sum(1) > limit).double().mean())
    assert abs(statistics.power(26, 40.0, limit) - share) < 5 * 0.5 / math.sqrt(200_000)


@pytest.mark.parametrize(
    "total, probs",
    [(64, (0.5, 0.5)), (64, (0.84, 0.16)), (1000, (0.9, 0.1)), (1000, (0.99, 0.01)), (70, (0.66, 0.17, 0.17))],
)
def test_false_alarms_by_exact_sums(total, probs):
    """Over every possible count: the probability that either statistic detects a bias at the suite's level, of two findings."""
    alarm = 0.0
    pairs = [(n, m) for n in range(total + 1) for m in range(total + 1 - n)]
    counts = [(n,) for n in range(total + 1)] if len(probs) == 2 else pairs
    for cells in counts:
        cells = (*cells, total - sum(cells))
        ways = math.lgamma(total + 1) - sum(math.lgamma(n + 1) for n in cells)
        probability = math.exp(ways + sum(n * math.log(p) for n, p in zip(cells, probs, strict=True)))
        if 1e-12 < probability < 1e-4:  # what is likelier is near the mean
            findings = statistics.compare("", torch.tensor(cells), torch.tensor(probs), suite.LEVEL)
            alarm += probability * any(finding.p_value < suite.LEVEL for finding in findings)
    assert alarm <= 1.2 * 2 * suite.LEVEL


def test_p_values_are_uniform():
    """Under the distribution itself, a p-value below 1/100 comes once in a hundred: 5 standard errors."""
    probs = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.08, 0.05, 0.015, 0.004, 0.001], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    runs, hits = 1500, torch.zeros(2)
    for _ in range(runs):
        sample = torch.multinomial(probs, 4000, replacement=True, generator=generator)
        findings = statistics.compare("", torch.bincount(sample, minlength=len(probs)), probs, 1e-2)
        hits += torch.tensor([finding.p_value < 0.01 for finding in findings])
    assert ((hits / runs - 0.01).abs() < 5 * math.sqrt(0.01 / runs)).all()


def test_stated_power_is_there_for_the_bias_that_is_hardest_to_see():
    """Differences in proportion to the distribution, + on half of it and - on the other: lambda = 4 N TV^2 exactly."""
    probs = torch.full((27,), 1 / 27, dtype=torch.float64)[:26]
    probs = probs / probs.sum()
    samples = 20_000
    sees = statistics.smallest_bias(25, samples, 1e-6)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(13)
    generator = torch.Generator().manual_seed(3)
    seen = {}
    for size in (0.0, 0.5, 1.0):
        biased = probs * (1 + 2 * size * sees * sign)
        assert float((biased - probs).abs().sum() / 2) == pytest.approx(size * sees)
        count = 0
        for _ in range(200):
            sample = torch.multinomial(biased, samples, replacement=True, generator=generator)
            findings = statistics.compare("", torch.bincount(sample, minlength=26), probs, 1e-6)
            assert findings[0].sees == pytest.approx(sees)
            count += findings[0].p_value < 1e-6
        seen[size] = count
    assert seen[0.0] == 0 and seen[0.5] < 100 and seen[1.0] >= 197


def test_impossible_outcomes_and_too_few_samples():
    assert all(f.p_value == 0.0 for f in statistics.compare("", torch.tensor([5, 1]), torch.tensor([1.0, 0.0]), 1e-6))
    few = statistics.compare("", torch.tensor([3, 1]), torch.tensor([0.5, 0.5]), 1e-6)
    assert all(finding.p_value == 1.0 and finding.sees is None for finding in few)


def test_rare_events_are_poisson():
    def tail(counts, mean):
        return sum(math.exp(-mean + n * math.log(mean) - math.lgamma(n + 1)) for n in counts)

    assert statistics.rare("", 0, 24.0).p_value == pytest.approx(2 * math.exp(-24.0))
    assert statistics.rare("", 50, 24.0).p_value == pytest.approx(2 * tail(range(50, 300), 24.0))
    assert statistics.rare("", 12, 24.0).p_value == pytest.approx(2 * tail(range(13), 24.0))
    assert statistics.rare("", 24, 24.0).p_value > 0.9


def test_at_least_is_one_sided():
    assert statistics.at_least("", 1.0, 1.1, 0.5, 400).p_value == pytest.approx(0.5 * math.erfc(4 / math.sqrt(2)), rel=1e-6)
    assert statistics.at_least("", 1.3, 1.1, 0.5, 400).p_value > 0.999
    assert statistics.at_least("", 0.0, 0.0, 0.0, 400).p_value == 1.0
