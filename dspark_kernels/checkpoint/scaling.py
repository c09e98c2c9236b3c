"""Kinds of RoPE that stretch the context: the frequencies of a head's pairs, and the factor of their cosines and sines.

    yarn     f_i = ramp_i / (s theta^(2i/D)) + (1 - ramp_i) / theta^(2i/D),  cos and sin times m = 0.1 ln s + 1
             ramp_i = clamp((i - low) / (high - low), 0, 1),  low, high = where a pair turns beta_fast, beta_slow times in L tokens
    llama3   f_i = theta^(-2i/D) where its wavelength is below L / high, a factor s smaller above L / low, blended between

Symbols: D head size, s factor, L original_max_position_embeddings. Computed in fp32 in the order of Hugging Face transformers, so
that angles at far positions are those of the publisher. Sources: YaRN, arXiv 2309.00071; transformers 5.19,
modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .places import Found, is_number


class Yarn(NamedTuple):
    """The parameters of `yarn`. attention: the factor of cosines and sines."""

    factor: float
    original: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention: float

    def frequencies(self, theta: float, head_dim: int, device) -> Tensor:
        """fp32 [D/2]."""
        turns = theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        low, high = (self._pair(theta, head_dim, beta) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0
        pairs = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
        kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
        return 1 / (self.factor * turns) * (1 - kept) + 1 / turns * kept

    def _pair(self, theta: float, head_dim: int, turns: float) -> float:
        """The pair that turns so many times within the original context."""
        return head_dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))


class Llama3(NamedTuple):
    """The parameters of `llama3`."""

    factor: float
    original: float
    low: float
    high: float

    attention = 1.0

    def frequencies(self, theta: float, head_dim: int, device) -> Tensor:
        """fp32 [D/2]."""
        plain = 1 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        length = 2 * math.pi / plain
        slow = torch.where(length > self.original / self.low, plain / self.factor, plain)
        blend = (self.original / length - self.low) / (self.high - self.low)
        middle = (length >= self.original / self.high) & (length <= self.original / self.low)
        return torch.where(middle, (1 - blend) * slow / self.factor + blend * slow, slow)


Scaling = Yarn | Llama3
KINDS = ("yarn", "llama3")


def take(kind: str, found: dict[str, Found], source) -> Scaling:
    """The parameters of a kind, which leave `found`. Raises ValueError for one that is missing or no number of its range."""

    def number(key: str, default: float | None = None, low: float = 0.0) -> float:
        each = found.pop(key, None)
        if each is None and default is not None:
            return default
        if each is None:
            raise ValueError(f"{source}: expected the key {key!r} with rope_type {kind!r}, for readers fill it in differently")
        if not is_number(each.value) or not low < each.value < math.inf:
            raise ValueError(f"{source}: expected {each.where} above {low:g}, got {each.value!r}")
        return float(each.value)

    factor, original = number("factor"), number("original_max_position_embeddings")
    if factor < 1:
        raise ValueError(f"{source}: expected a factor of at least 1 with rope_type {kind!r}, got {factor:g}")
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise ValueError(f"{source}: expected low_freq_factor below high_freq_factor, got {low:g} and {high:g}")
        return Llama3(factor, original, low, high)
    truncate = found.pop("truncate", Found("", True))
    if type(truncate.value) is not bool:
        raise ValueError(f"{source}: expected {truncate.where} true or false, got {truncate.value!r}")
    attention = number("attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return Yarn(factor, original, number("beta_fast", 32.0), number("beta_slow", 1.0), truncate.value, attention)
