"""The passes over a row of logits that its filters make, on the host; a test compares the kernel with them.

The integers are those of kernels/primitives/filters.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

GROUP, BLOCK, LOWEST = 128, 1024, 8388608  # of kernels/primitives/filters.py
ONE = 2.0**40


class Again(NamedTuple):
    """share: of a row's groups that are read again. passes: over these groups. rows: the product, in whole rows read."""

    share: float
    passes: int

    @property
    def rows(self) -> float:
        return self.share * self.passes


def _keys(x: Tensor) -> Tensor:
    bits = (x + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + 2**31


def _logit(key: int) -> Tensor:
    bits = key - 2**31
    return torch.tensor(bits ^ 0x7FFFFFFF if bits < 0 else bits, dtype=torch.int32).view(torch.float32)


def _bound(keys: Tensor, weights: Tensor, wanted: int) -> int:
    """The largest key whose F reaches `wanted`, 0 for none."""
    order = keys.argsort(descending=True)
    sums = weights[order].cumsum(0)
    places = (sums >= wanted).nonzero()
    return int(keys[order[places[0, 0]]]) if len(places) else 0


class _Row:
    """Elements of the groups that reach the bound, and a count of the passes over them."""

    def __init__(self, x: Tensor, keys: Tensor, sums: Tensor, top: Tensor, scale: float, low: int):
        self.x, self.keys, self.sums, self.top, self.scale = x, keys, sums, top, scale
        self.low, self.high, self.passes, self.whole = low, int(_keys(top[None])[0]) + 1, 0, None
        self.held = (0, 0)  # keys of the list

    def largest(self, wanted: int, by_sum: bool) -> tuple[int, int]:
        """The largest key whose F reaches `wanted`, and F above it."""
        weights = self.sums if by_sum else torch.ones_like(self.sums)
        low, high = self.low, self.high
        inside = lambda: int(((self.keys >= max(low, 1)) & (self.keys < high)).sum())  # noqa: E731
        if self.whole is None:
            self.passes, self.whole = self.passes + 1, inside() <= BLOCK
        fits = self.whole
        least = self.top - 40.0 / torch.tensor(self.scale, dtype=torch.float32)
        while not fits and high - low > 1:
            left = torch.maximum(_logit(max(low, LOWEST)), least) if low > 0 else least
            x = left + (_logit(high - 1) - left) * torch.tensor([0.25, 0.5, 0.75])
            at = [min(max(t, low + 1), high - 1) for t in (*_keys(x).tolist(), low + (high - low) // 2)]
            reaches = [int(weights[self.keys >= t].sum()) >= wanted for t in at]
            low = max([low] + [t for t, r in zip(at, reaches, strict=True) if r])
            high = min([high] + [t for t, r in zip(at, reaches, strict=True) if not r])
            fits = inside() <= BLOCK
            self.passes += 2 if fits else 1
        self.held = (low, high) if fits else (0, 0)
        found = max(_bound(self.keys, weights, wanted), low)
        return found, int(weights[self.keys > found].sum())


def read_again(row: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, joint=False, group=GROUP) -> Again:
    """For a row of logits [V] whose settings remove something."""
    x = torch.where(row.isnan(), -math.inf, row.float())
    top, scale, vocab = x.max(), 1.4426950408889634 / temperature, x.shape[0]
    padded = torch.nn.functional.pad(x, (0, -vocab % group), value=-math.inf).view(-1, group)
    maxima = padded.amax(1)

    def keyed(x):
        alive = x > -math.inf
        return torch.where(alive, _keys(x), 0), torch.where(alive, (torch.exp2((x - top) * scale) * ONE).long(), 0)

    group_keys, group_sums = keyed(maxima)
    use_k, use_p = 0 < top_k < vocab, top_p < 1
    after_k = use_k and use_p and not joint
    wanted = max(int(keyed(x)[1].sum().float() * top_p), 1)
    fails = 0
    if min_p > 0:
        least, failing = math.log2(min(min_p, 1.0)), (x - top) * scale
        # The bound is a key between the last that fails and the first that does not.
        fails = int(_keys(top + torch.tensor([least / scale]))[0]) - 1 if bool((failing < least).any()) else LOWEST - 1
    bound = max(
        _bound(group_keys, torch.ones_like(group_keys), top_k) if use_k else 0,
        _bound(group_keys, group_sums, wanted) if use_p and not after_k else 0,
        0 if after_k else fails + 1,
        1,
    )
    reach = group_keys >= bound
    own = padded[reach].flatten()
    state = _Row(own, *keyed(own), top, scale, bound if bound > 1 else 0)
    threshold, ties = fails, 0
    if use_k:
        t, above = state.largest(top_k, False)
        if after_k:
            state.passes += 0 if state.whole else 1
            total = int(state.sums[state.keys > t].sum())
            least_sum = int(keyed(_logit(max(t, LOWEST))[None])[1][0]) if t > 0 else 0
            wanted = max(int(torch.tensor(total + (top_k - above) * least_sum).float() * top_p), 1)
        if t > threshold:
            threshold, ties = t, top_k - above
    if use_p:
        t, _ = state.largest(wanted, True)
        if t >= threshold:
            threshold, ties = t, 1
    if ties > 0 and not state.held[0] <= threshold < state.held[1]:
        state.passes += 1
    return Again(float(reach.float().mean()), state.passes + 1)


SETTINGS = (
    dict(top_k=20), dict(top_k=50), dict(top_k=2000), dict(top_p=0.5), dict(top_p=0.9), dict(top_p=0.95), dict(top_p=0.99),
    dict(top_k=50, top_p=0.9), dict(top_k=2000, top_p=0.95), dict(min_p=0.1), dict(top_p=0.95, min_p=0.02),
)  # fmt: skip


def run(options) -> int:
    """0: the table is printed."""
    print("| setting | " + " | ".join(f"spread {spread}" for spread in (1, 2, 4)) + " |")
    print("| --- | --- | --- | --- |")
    g = torch.Generator().manual_seed(0)
    rows = [(torch.randn(options.vocab, generator=g) * spread).bfloat16() for spread in (1, 2, 4)]
    for setting in SETTINGS:
        cells = []
        for row in rows:
            again = read_again(row, options.temperature, **setting)
            cells.append(f"{again.share:.1%} x {again.passes} = {again.rows:.2f} rows")
        print(f"| {', '.join(f'{name} {value:g}' for name, value in setting.items())} | {' | '.join(cells)} |")
    return 0
