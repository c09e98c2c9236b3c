"""The n largest of a block of keys, ties to the lowest index: a threshold found by search, then one scan for ranks and places.

    selected <=> key > t, or key = t and fewer than n - |{key > t}| equal keys stand before it

A step of the search counts the keys at or above two thresholds at once, in one sum over the block, and leaves a third of the range:
what it costs is the barriers of that sum. It ends as soon as exactly n keys reach a threshold. Symbols: key = int32 in the order of
an fp32 value.
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
def threshold(keys, wanted, least=None):
    """A key t with at least `wanted` of the keys, at most 2^14, at t or above, and with fewer above it.

    wanted >= 1 keys are not ABSENT. least: a key that so many keys reach, where one is known.
    """
    high = tl.max(keys).to(tl.int64)
    if least is None:
        low = tl.min(tl.where(keys == ABSENT, 2147483647, keys)).to(tl.int64)
    else:
        low = least.to(tl.int64)
    while low < high:
        # low < first <= second <= high; both counts fit in one word.
        third = (high - low + 2) // 3
        first = low + third
        second = tl.minimum(first + third, high)
        reached = (keys >= first.to(tl.int32)).to(tl.int32) + ((keys >= second.to(tl.int32)).to(tl.int32) << 16)
        counts = tl.sum(reached)
        of_first = counts & 0xFFFF
        of_second = counts >> 16
        low = tl.where(of_second >= wanted, second, tl.where(of_first >= wanted, first, low))
        above = tl.where(of_second >= wanted, high, tl.where(of_first >= wanted, second - 1, first - 1))
        high = tl.where((of_second == wanted) | (of_first == wanted), low, above)
    return low.to(tl.int32)


@triton.jit
def select(keys, wanted, least=None, found=None):
    """(threshold, selected bool, place int32 of the selected in index order) of keys [M, N], row by row, at most 2^14.

    least: as of `threshold`. found: how many keys are not ABSENT, where that is known; nothing is searched if all are wanted.
    """
    if found is None:
        t = threshold(keys, wanted, least)
    else:
        t = tl.full((), ABSENT, tl.int32)
        if found > wanted:
            t = threshold(keys, wanted, least)
    above = (keys > t).to(tl.int32)
    tied = (keys == t).to(tl.int32)
    both = above + (tied << 16)  # two counts in one scan: inside rows, then over rows
    rows = tl.sum(both, axis=1)
    ranks = tl.cumsum(both, axis=1) + (tl.cumsum(rows, axis=0) - rows)[:, None]
    left = wanted - tl.sum(above)
    if found is not None:
        left = tl.where(found > wanted, left, 0)
    tied_rank = ranks >> 16
    selected = (above == 1) | ((tied == 1) & (tied_rank <= left))
    return t, selected, (ranks & 0xFFFF) + tl.minimum(tied_rank, left) - 1
