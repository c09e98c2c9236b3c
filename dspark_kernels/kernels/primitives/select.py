"""The n largest of a block of keys, ties to the lowest index: a threshold found by search, then one scan for ranks and places.

    selected <=> key > t, or key = t and fewer than n - |{key > t}| equal keys stand before it

A step of the search counts the keys at or above two thresholds at once, in one sum over the block, and leaves a third of the range:
what it costs is the barriers of that sum. It ends as soon as exactly n keys reach a threshold. Symbols: key = int32 in the order of
an fp32 value.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

ABSENT = tl.constexpr(-2147483648)  # below the key of every value


@triton.jit
def ordered_key(x, SHIFT: tl.constexpr):
    """int32 in the order of x fp32 (not NaN), -0.0 and 0.0 alike; SHIFT: low bits that no value of the stored dtype sets."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def threshold(keys, wanted, least=None, most=None, NEAR: tl.constexpr = 0xFFFFFFFF):
    """(a key t with at least `wanted` of the keys, at most 2^14, at t or above, and with fewer above it; how many are above it, or
    fewer where exactly `wanted` are at t or above).

    wanted >= 1 keys are not ABSENT. least: a key that so many keys reach, most: one that none exceeds; where they are known. NEAR:
    how far from `least` the first step looks, where t is likely to be close to it.
    """
    if most is None:
        high = tl.max(keys)
    else:
        high = most
    if least is None:
        low = tl.min(tl.where(keys == ABSENT, 2147483647, keys))
    else:
        low = least
    over = wanted * 0
    reach = tl.full((), NEAR, tl.uint32)
    while low < high:
        # low < first <= second <= high; both counts fit in one word. The range can be wider than an int32, a third of it is not.
        span = (high - low).to(tl.uint32, bitcast=True)
        third = tl.minimum((span - 1) // 3 + 1, reach)
        reach = tl.full((), 0xFFFFFFFF, tl.uint32)
        first = low + third.to(tl.int32, bitcast=True)
        second = first + tl.minimum(third, span - third).to(tl.int32, bitcast=True)
        reached = (keys >= first).to(tl.int32) + ((keys >= second).to(tl.int32) << 16)
        counts = tl.sum(reached)
        of_first = counts & 0xFFFF
        of_second = counts >> 16
        over = tl.where(of_second >= wanted, over, tl.where(of_first >= wanted, of_second, of_first))
        low = tl.where(of_second >= wanted, second, tl.where(of_first >= wanted, first, low))
        above = tl.where(of_second >= wanted, high, tl.where(of_first >= wanted, second - 1, first - 1))
        high = tl.where((of_second == wanted) | (of_first == wanted), low, above)
    return low, over


@triton.jit
def scatter(ptr, place, values, selected):
    """Store int32 `values` at ptr + place where `selected`, from the threads that have them: `tl.store` would move every element to
    a layout of its own first."""
    if is_cuda():
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, $3; }",
            "=r,l,r,r", [(ptr + place).to(tl.int64), values, selected.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(ptr + place, values, mask=selected)


@triton.jit
def select(keys, wanted, least=None, most=None, found=None, NEAR: tl.constexpr = 0xFFFFFFFF):
    """(threshold, selected bool, place int32 of the selected in index order) of keys [M, N], row by row, at most 2^14.

    least, most, NEAR: as of `threshold`. found: how many keys are not ABSENT, where that is known; nothing is searched if all are
    wanted.
    """
    if found is None:
        t, over = threshold(keys, wanted, least, most, NEAR)
        left = wanted - over
    else:
        t = tl.full((), ABSENT, tl.int32)
        left = wanted * 0
        if found > wanted:
            t, over = threshold(keys, wanted, least, most, NEAR)
            left = wanted - over
    above = (keys > t).to(tl.int32)
    tied = (keys == t).to(tl.int32)
    both = above + (tied << 16)  # two counts in one scan: inside rows, then over rows
    rows = tl.sum(both, axis=1)
    ranks = tl.cumsum(both, axis=1) + (tl.cumsum(rows, axis=0) - rows)[:, None]
    tied_rank = ranks >> 16
    selected = (above == 1) | ((tied == 1) & (tied_rank <= left))
    return t, selected, (ranks & 0xFFFF) + tl.minimum(tied_rank, left) - 1
