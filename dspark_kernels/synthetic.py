"""Acceptance made up for load tests: rates at which rounds have a given mean length.

A round that accepts its first n drafts emits n + 1 tokens. With rates r_1 .. r_K, each given that the drafts before it were accepted,
its mean length is 1 + r_1 + r_1 r_2 + ... + r_1 ... r_K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .checks import check_device, check_int


def synthetic_rates(
    mean_length: float, drafts: int, profile: Iterable[float] | None = None, device: str | torch.device | None = None
) -> Tensor:
    """Rates fp32 [K] for `accept_chain(synthetic_rates=...)` at which a round of K drafts emits `mean_length` tokens on average.

    Args:
        mean_length: tokens per round, the correction or bonus token included: from 1 (no draft is accepted) to K + 1 (all are).
        drafts: K. Requests that verify fewer drafts emit fewer tokens.
        profile: K rates that were measured, that of draft k among the rounds that accepted those before it; all are raised to one
            power, so that their order stays. None = one rate for all positions: the accepted length is geometric, cut at K.
        device: of the result; None = the current CUDA device, or the CPU where there is none.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, or a mean that no power of the profile has: rates of 0 stay 0,
            and rates of 1 stay 1.
    """
    check_int("drafts", drafts, low=1)
    if isinstance(mean_length, bool) or not isinstance(mean_length, (int, float)):
        raise TypeError(f"mean_length: expected a number, got {type(mean_length).__name__}")
    rates = [math.exp(-1.0)] * drafts if profile is None else [float(rate) for rate in profile]
    if len(rates) != drafts:
        raise ValueError(f"profile: expected {drafts} rates, got {len(rates)}")
    if not all(0.0 <= rate <= 1.0 for rate in rates):
        raise ValueError(f"profile: expected rates from 0 to 1, got {rates}")
    least = mean_length_of([rate if rate == 1.0 else 0.0 for rate in rates])
    most = mean_length_of([rate if rate == 0.0 else 1.0 for rate in rates])
    if not least <= mean_length <= most:
        place = f"of {drafts} drafts" if profile is None else "that a power of the profile can have"
        raise ValueError(f"mean_length: expected one {place}, from {least:g} to {most:g}, got {mean_length:g}")
    return torch.tensor(_raised(rates, mean_length, least, most), dtype=torch.float32, device=check_device("device", device))


def mean_length_of(rates: Iterable[float]) -> float:
    """Mean tokens per round at these rates: 1 + r_1 + r_1 r_2 + ..."""
    mean, accepted = 1.0, 1.0
    for rate in rates:
        accepted *= rate
        mean += accepted
    return mean


def _raised(rates: list[float], mean_length: float, least: float, most: float) -> list[float]:
    """rates ** t with the t at which the mean is `mean_length`; it falls as t grows."""
    if mean_length == most:
        return [float(rate > 0.0) for rate in rates]
    if mean_length == least:
        return [float(rate == 1.0) for rate in rates]
    low, high = -64.0, 64.0  # log2 of t
    for _ in range(100):
        middle = (low + high) / 2
        above = mean_length_of(rate ** (2.0**middle) for rate in rates) > mean_length
        low, high = (middle, high) if above else (low, middle)
    return [rate ** (2.0**low) for rate in rates]
