"""Philox 4x32-10 and the noise made from it, in integer and fp64 arithmetic.

    counter = (lane >> 2, decided position, anchor position, stream | node << 8), key = the 64-bit seed, word = output[lane & 3]
    v = min((word + 1/2) 2^-32, 1 - 2^-24),  E = -log1p(-v)

Symbols: lane = token id, index of a vocabulary block, or 0; node = tree slot (0 in chains). Source: Salmon, Moraes, Dror, Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011; the addressing is this project's (docs/randomness.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(key0, key1, c0, c1, c2, c3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four output words, int64 tensors holding uint32, for broadcastable counters and keys (ints or int64 tensors)."""
    device = next((t.device for t in (c0, c1, c2, c3, key0, key1) if isinstance(t, Tensor)), None)
    words = [torch.as_tensor(c, dtype=torch.int64, device=device) & _MASK for c in (c0, c1, c2, c3, key0, key1)]
    c0, c1, c2, c3, key0, key1 = torch.broadcast_tensors(*words)
    per_word = (2,) + (1,) * c0.dim()
    multipliers, weyl = (torch.tensor(pair, device=c0.device).view(per_word) for pair in (_MULTIPLIERS, _WEYL))
    multiplied, mixed, key = torch.stack((c0, c2)), torch.stack((c1, c3)), torch.stack((key0, key1))
    keys = key + weyl * torch.arange(ROUNDS, device=c0.device).view(-1, 1, *per_word[1:])
    for key in keys:
        # int64 products wrap: bits 32 to 63 are the high word, whatever the sign; what lies above a word is masked off later.
        product = (multipliers * multiplied).flip(0)
        multiplied = ((product >> 32) ^ mixed ^ key) & _MASK
        mixed = product
    mixed = mixed & _MASK
    return multiplied[0], mixed[0], multiplied[1], mixed[1]


def _one(key0: int, key1: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
    """`philox` of one counter, in Python's integers, for single words."""
    c0, c1, c2, c3 = c0 & _MASK, c1 & _MASK, c2 & _MASK, c3 & _MASK
    for _ in range(ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ key0, second & _MASK, first >> 32 ^ c3 ^ key1, first & _MASK
        key0, key1 = key0 + _WEYL[0] & _MASK, key1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def words(seed: int, lanes: Tensor, position: int, anchor_position: int, stream: int, node: int = 0) -> Tensor:
    """The random word of each lane (int64 holding uint32, shape of `lanes`)."""
    address = (position, anchor_position, int(stream) | node << 8)
    if lanes.numel() == 1:
        output = _one(seed & _MASK, (seed >> 32) & _MASK, int(lanes) >> 2, *address)
        return torch.full_like(lanes, output[int(lanes) & 3])
    # Neighbouring lanes share a counter: each is computed once.
    counters, which = torch.unique_consecutive(lanes >> 2, return_inverse=True)
    output = philox(seed & _MASK, (seed >> 32) & _MASK, counters, *address)
    return torch.stack(output, -1)[which, lanes & 3]


def uniform(word: Tensor) -> Tensor:
    """fp64 in (0, 1 - 2^-24]."""
    return ((word.double() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)


def exponential(word: Tensor) -> Tensor:
    """Exp(1) variate of each word, fp64."""
    return -torch.log1p(-uniform(word))


def gumbel(seed: int, lanes: Tensor, position: int, anchor_position: int, stream: int, node: int = 0) -> Tensor:
    """-ln E of each lane: added to log weights, the arg-max is a draw."""
    return -torch.log(exponential(words(seed, lanes, position, anchor_position, stream, node)))
