"""Fits the temperatures that calibrate confidences, and measures how well they are calibrated.

    survival of draft k = product over i <= k of sigmoid(logit_i / T_i);   T_k = argmin over a grid of ECE(survival_k)
    ECE = sum over bins of (share of samples in the bin) * |mean predicted - mean observed|

Symbols: N held-out rounds, K draft positions, T the temperatures of sequential temperature scaling (STS), ECE the
expected calibration error over equal-width bins of [0, 1]. `survived[n, k]` is 1 where draft k of round n was accepted
together with every draft before it.

Sources: STS: arXiv 2607.05147; ECE and temperature scaling: Guo et al., "On Calibration of Modern Neural Networks",
arXiv 1706.04599. All arithmetic in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# 2^(i/24), i = -96..96: from 1/16 to 16 in steps of 2.9 %, ordered from 1 (change nothing) outwards.
STS_GRID = tuple(2.0 ** (i / 24) for i in sorted(range(-96, 97), key=lambda i: (abs(i), i)))
# Errors this close count as equal. Rounding leaves 1e-14 for a million rounds, and it must not choose between temperatures
# that are equally good (every temperature is, where mirrored logits share a bin).
EQUAL = 1e-12


def _pairs(probs: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    if probs.shape != outcomes.shape:
        raise ValueError(f"outcomes: expected shape {list(probs.shape)}, got {list(outcomes.shape)}")
    if probs.numel() == 0:
        raise ValueError("probs: expected at least one sample, got none")
    probs, outcomes = probs.detach().double().flatten(), outcomes.detach().double().flatten()
    if not bool(((probs >= 0) & (probs <= 1)).all()):
        raise ValueError("probs: expected probabilities in [0, 1], got values outside or NaN")
    if not bool(((outcomes == 0) | (outcomes == 1)).all()):
        raise ValueError("outcomes: expected only 0 and 1, got other values")
    return probs, outcomes


def _bin_of(probs: Tensor, bins: int) -> Tensor:
    """Equal-width bins, closed below; 1 belongs to the last one."""
    if bins < 1:
        raise ValueError(f"bins: expected >= 1, got {bins}")
    return (probs * bins).long().clamp(max=bins - 1)


def _calibration_error(probs: Tensor, outcomes: Tensor, bins: int) -> float:
    # share * |mean - mean| = |sum - sum| / N
    gaps = torch.bincount(_bin_of(probs, bins), probs - outcomes, bins)
    return float(gaps.abs().sum()) / len(probs)


def expected_calibration_error(probs: Tensor, outcomes: Tensor, bins: int = 20) -> float:
    """Expected calibration error over `bins` equal-width bins. probs in [0, 1] and outcomes 0/1, any equal shape."""
    return _calibration_error(*_pairs(probs, outcomes), bins)


def brier(probs: Tensor, outcomes: Tensor) -> float:
    """Mean squared difference between probability and outcome."""
    probs, outcomes = _pairs(probs, outcomes)
    return float(((probs - outcomes) ** 2).mean())


def auc(probs: Tensor, outcomes: Tensor, bins: int = 1000) -> float:
    """Probability that a survivor got a higher probability than a non-survivor, ties counted half; NaN where one kind is
    missing.

    From histograms: probabilities in the same of `bins` equal-width bins count as tied.
    """
    probs, outcomes = _pairs(probs, outcomes)
    where = _bin_of(probs, bins)
    ones = torch.bincount(where, outcomes, bins)
    zeros = torch.bincount(where, 1 - outcomes, bins)
    below = zeros.cumsum(0) - zeros / 2
    return float((ones * below).sum() / (ones.sum() * zeros.sum()))


def fit_sts(logits: Tensor, survived: Tensor, *, bins: int = 20, observed: Tensor | None = None) -> Tensor:
    """Sequential temperature scaling: fp32 [K].

    logits [N, K]: raw confidence logits; survived [N, K]: 0/1 prefix survival; observed [N, K]: bool, whether draft k of
    round n was verified, a prefix of each round (None: all were). From left to right, position k takes the temperature
    of STS_GRID whose cumulative product of sigmoid(logit / T) has the least ECE over the rounds that verified draft k,
    earlier positions fixed; among equals the one closest to 1 (in ratio), the smaller if still tied. Logits and
    survival of drafts that were not verified are never looked at; a position that no round verified gets 1.
    """
    if logits.dim() != 2 or logits.shape != survived.shape:
        raise ValueError(f"survived: expected logits and survived [N, K], got {list(logits.shape)} and {list(survived.shape)}")
    if logits.numel() == 0:
        raise ValueError(f"logits: expected at least one round and one draft, got {list(logits.shape)}")
    if observed is not None and (observed.shape != logits.shape or observed.dtype != torch.bool):
        raise ValueError(f"observed: expected bool {list(logits.shape)}, got {observed.dtype} {list(observed.shape)}")
    drafts = logits.shape[1]
    # verified[n]: how many drafts of round n were.
    verified = []
    for flags in [[True] * drafts] * len(logits) if observed is None else observed.tolist():
        length = flags.index(False) if False in flags else drafts
        if any(flags[length:]):
            raise ValueError("observed: expected the verified drafts to be a prefix of the round, got others")
        verified.append(length)
    scores, outcomes = logits.detach().double(), survived.detach().double()
    for length, score, outcome in zip(verified, scores.tolist(), outcomes.tolist(), strict=True):
        if any(math.isnan(x) for x in score[:length]):
            raise ValueError("logits: expected numbers, got NaN")
        seen = outcome[:length]
        if any(y not in (0.0, 1.0) for y in seen) or seen != sorted(seen, reverse=True):
            raise ValueError("survived: expected 0/1 that never rises along a round (prefix survival), got other values")
    survival = torch.ones_like(scores[:, 0])
    temperatures = []
    for k in range(drafts):
        rounds = [n for n, length in enumerate(verified) if length > k]
        if not rounds:
            temperatures.append(1.0)
            continue

        def error(temperature, earlier=survival[rounds], score=scores[rounds, k], outcome=outcomes[rounds, k]):
            return _calibration_error(earlier * torch.sigmoid(score / temperature), outcome, bins)

        errors = [error(temperature) for temperature in STS_GRID]
        # The first of equals, so a temperature stays near 1 unless the data says otherwise.
        temperatures.append(next(t for t, e in zip(STS_GRID, errors, strict=True) if e <= min(errors) + EQUAL))
        survival = survival * torch.sigmoid(scores[:, k] / temperatures[-1])
    return torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
