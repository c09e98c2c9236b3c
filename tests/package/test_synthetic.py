"""Rates of made-up acceptance: their mean is exact, their order that of the profile, and rounds have the length asked for."""

import math
from itertools import pairwise

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.synthetic import mean_length_of
from reference import cases

MEASURED = (0.93, 0.81, 0.84, 0.7, 0.55)


def mean_by_lengths(rates):
    """Sum over accepted lengths n of (n + 1) x its probability, rather than the sum of survivals that the code has."""
    drafts = len(rates)
    total = 0.0
    for n in range(drafts + 1):
        total += (n + 1) * math.prod(rates[:n]) * (1.0 if n == drafts else 1.0 - rates[n])
    return total


@pytest.mark.parametrize("profile", [None, MEASURED, (0.9, 0.0, 0.5, 0.5, 0.5), (1.0, 0.9, 0.8, 0.7, 0.6)])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.5, 0.99, 1.0])
def test_the_mean_is_the_one_asked_for(profile, share):
    ones = [1.0] * 5 if profile is None else [float(rate == 1.0) for rate in profile]
    least = 1.0 if profile is None else mean_by_lengths(ones)
    most = 6.0 if profile is None else mean_by_lengths([float(rate > 0.0) for rate in profile])
    wanted = least + share * (most - least)
    rates = dk.synthetic_rates(wanted, 5, profile)
    assert rates.dtype == torch.float32 and rates.shape == (5,)
    assert mean_by_lengths(rates.double().tolist()) == pytest.approx(wanted, abs=1e-5)
    assert mean_length_of(rates.double().tolist()) == pytest.approx(mean_by_lengths(rates.double().tolist()), abs=1e-12)
    if profile is None:
        assert len(set(rates.tolist())) == 1
    else:
        order = sorted(range(5), key=lambda k: profile[k])
        assert all(rates[a] <= rates[b] for a, b in pairwise(order))


def test_a_profile_with_its_own_mean_stays():
    rates = dk.synthetic_rates(mean_by_lengths(MEASURED), 5, MEASURED)
    assert torch.allclose(rates, torch.tensor(MEASURED), atol=1e-6)


def test_rounds_have_that_length():
    """60 requests of 3 drafts each: the mean within five standard errors."""
    wanted, requests = 2.6, 60
    case = cases.accept_case(seed=5, requests=requests, drafts=3, vocab=40, lengths=torch.full((requests,), 3))
    case.synthetic_rates = dk.synthetic_rates(wanted, 3, MEASURED[:3])
    emitted = dk.accept_chain(**case.arguments()).num_emitted.double()
    assert abs(emitted.mean() - wanted) < 5 * emitted.std() / requests**0.5


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0.5, 4), ValueError, "mean_length: expected one of 4 drafts, from 1 to 5, got 0.5"),
        ((5.5, 4), ValueError, "mean_length: expected one of 4 drafts, from 1 to 5, got 5.5"),
        ((float("nan"), 4), ValueError, "mean_length: expected one of 4 drafts, from 1 to 5, got nan"),
        ((2.0, 0), ValueError, "drafts: expected >= 1, got 0"),
        (("2", 4), TypeError, "mean_length: expected a number, got str"),
        ((2.0, 3, (0.5, 0.5)), ValueError, "profile: expected 3 rates, got 2"),
        ((2.0, 2, (0.5, 1.5)), ValueError, "profile: expected rates from 0 to 1, got [0.5, 1.5]"),
        ((2.5, 2, (0.5, 0.0)), ValueError, "mean_length: expected one that a power of the profile can have, from 1 to 2, got 2.5"),
        ((1.5, 2, (1.0, 0.5)), ValueError, "mean_length: expected one that a power of the profile can have, from 2 to 3, got 1.5"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error) as caught:
        dk.synthetic_rates(*arguments)
    assert str(caught.value) == message
