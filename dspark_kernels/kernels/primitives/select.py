"""The n largest of a block of keys, ties to the lowest index: a threshold found by bisection, then one scan for ranks and places.

    selected <=> key > t, or key = t and fewer than n - |{key > t}| equal keys stand before it

The threshold search ends as soon as exactly n keys reach it. Symbols: key = int32 in the order of an fp32 value.
"""

import triton
import triton.language as tl

ABSENT = tl.constexpr(-2147483648)  # below the key of every value


@triton.jit
def ordered_key(x, SHIFT: tl.constexpr):
    """int32 in the order of x fp32 (not NaN), -0.0 and 0.0 alike; SHIFT: low bits that no value of the stored dtype sets."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def threshold(keys, wanted):
    """A key t with at least `wanted` of the keys at t or above, and with fewer above it. wanted >= 1 keys are not ABSENT."""
    low = tl.min(keys)
    high = tl.max(keys)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # of the two, rounded up, without overflow
        count = tl.sum((keys >= middle).to(tl.int32))
        high = tl.where(count > wanted, high, tl.where(count == wanted, middle, middle - 1))
        low = tl.where(count >= wanted, middle, low)
    return low


@triton.jit
def select(keys, wanted):
    """(threshold, selected bool, place int32 of the selected in index order) of keys [M, N], row by row, at most 2^14."""
    t = threshold(keys, wanted)
    above = (keys > t).to(tl.int32)
    tied = (keys == t).to(tl.int32)
    both = above + (tied << 16)  # two counts in one scan: inside rows, then over rows
    rows = tl.sum(both, axis=1)
    ranks = tl.cumsum(both, axis=1) + (tl.cumsum(rows, axis=0) - rows)[:, None]
    left = wanted - tl.sum(above)
    tied_rank = ranks >> 16
    selected = (above == 1) | ((tied == 1) & (tied_rank <= left))
    return t, selected, (ranks & 0xFFFF) + tl.minimum(tied_rank, left) - 1
