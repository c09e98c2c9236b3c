"""top-k, top-p and min-p of a row of logits as two scalars: kept <=> key > threshold, or key = threshold and id <= cut.

key = ordered bits of the fp32 logit. Every filter keeps a prefix of the order (key descending, id ascending), so the strictest
wins. The maxima of groups of ids bound the threshold from below (top-k: the k-th largest maximum; top-p: the largest t whose maxima
alone carry p of the sum of exponentials), so only groups that reach the bound are read again, in passes that look at four keys
each, until what is left between two of them fits in a list. Sums are integers, 2^40 for the row's maximum, so that the result does
not depend on tiles. Reference: reference/sampling.py. Nothing of the size of a row is written.
"""

import triton
import triton.language as tl

from .constants import FILTER_LIST, NEG_INF, SUMEXP_ONE, VOCAB_BLOCK
from .sumexp import below_max, fixed_sums
from .vocab_blocks import SUMEXP_BITS

EVERYTHING = tl.constexpr(0)  # a threshold below every key
LOWEST = tl.constexpr(8388608)  # key of the least finite logit


@triton.jit
def ordered(x):
    """Key of fp32 logits (not NaN): int64 in [1, 2^32), monotone, -0.0 = 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648


@triton.jit
def _unordered(key):
    bits = (key - 2147483648).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def kept(x, ids, threshold, cut):
    """Whether logits x (NaN read as -inf) of token ids are inside the support."""
    key = ordered(x)
    return (x > NEG_INF) & ((key > threshold) | ((key == threshold) & (ids <= cut)))


@triton.jit
def filter_is_on(top_k, top_p, min_p, width):
    """Whether a row's settings can leave anything out."""
    return ((top_k > 0) & (top_k < width)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _sumexp(x, top, scale):
    return (tl.exp2(below_max(x, top) * scale) * SUMEXP_ONE).to(tl.int64)


@triton.jit
def _block(b, groups_ptr, count, width, LOAD: tl.constexpr, source, GROUP: tl.constexpr):
    """Keys (0 = none) and ids of BLOCK elements of the groups."""
    TILE: tl.constexpr = FILTER_LIST // GROUP
    which = b * TILE + tl.arange(0, TILE)
    groups = tl.load(groups_ptr + which, mask=which < count, other=0)
    ids = tl.reshape(groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [FILTER_LIST])
    inside = tl.reshape((which < count)[:, None] & (tl.arange(0, GROUP) >= 0)[None, :], [FILTER_LIST]) & (ids < width)
    x = LOAD(ids, inside, source)
    return tl.where(inside & (x > NEG_INF), ordered(x), 0), ids


@triton.jit
def _list(keys_ptr, ids_ptr, count):
    """The same of the list, ids ascending."""
    entry = tl.arange(0, FILTER_LIST)
    keys = tl.load(keys_ptr + entry, mask=entry < count, other=0).to(tl.int64) + 2147483648
    return tl.where(entry < count, keys, 0), tl.load(ids_ptr + entry, mask=entry < count, other=0)


@triton.jit
def _weights(keys, top, scale, BY_SUMEXP: tl.constexpr):
    """int64 weight of elements: sum of exponentials, or 1."""
    weights = tl.full(keys.shape, 1, tl.int64)
    if BY_SUMEXP:
        weights = tl.where(keys > 0, _sumexp(_unordered(tl.maximum(keys, 1)), top, scale), 0)
    return weights


@triton.jit
def _collect(low, high, elements, lists, width, LOAD: tl.constexpr, source, GROUP: tl.constexpr):
    """Elements with keys in [low, high) into the list as far as they fit, and how many there are: one pass."""
    groups_ptr, num_groups = elements
    keys_ptr, ids_ptr = lists
    total = tl.zeros((), tl.int32)
    for b in range(tl.cdiv(num_groups, FILTER_LIST // GROUP)):
        keys, ids = _block(b, groups_ptr, num_groups, width, LOAD, source, GROUP)
        hit = ((keys >= tl.maximum(low, 1)) & (keys < high)).to(tl.int32)
        place = total + tl.cumsum(hit, axis=0) - 1
        fits = (hit == 1) & (place < FILTER_LIST)
        tl.store(keys_ptr + place, (keys - 2147483648).to(tl.int32), mask=fits)
        tl.store(ids_ptr + place, ids, mask=fits)
        total += tl.sum(hit, axis=0)
    tl.debug_barrier()
    return total


@triton.jit
def _reaching(t, elements, width, top, scale, LOAD: tl.constexpr, source, BY_SUMEXP: tl.constexpr, GROUP: tl.constexpr):
    """Number and weight of the elements with keys >= t, for four t: one pass."""
    groups_ptr, num_groups = elements
    quarter = tl.arange(0, 4)
    numbers = tl.zeros([4], tl.int32)
    sums = tl.zeros([4], tl.int64)
    for b in range(tl.cdiv(num_groups, FILTER_LIST // GROUP)):
        keys, ids = _block(b, groups_ptr, num_groups, width, LOAD, source, GROUP)
        for j in tl.static_range(4):  # one by one: a tile of all four takes more registers than there are
            hit = keys >= tl.max(tl.where(quarter == j, t, 0), axis=0)
            numbers += tl.where(quarter == j, tl.sum(hit.to(tl.int32), axis=0), 0)
            if BY_SUMEXP:
                sumexp = tl.sum(tl.where(hit, _sumexp(_unordered(keys), top, scale), 0), axis=0)
                sums += tl.where(quarter == j, sumexp, 0)
    if not BY_SUMEXP:
        sums = numbers.to(tl.int64)
    return numbers, sums


@triton.jit
def _largest(wanted, low, high, total, elements, lists, width, top, scale, LOAD: tl.constexpr, source, BY_SUMEXP: tl.constexpr,
             GROUP: tl.constexpr):  # fmt: skip
    """The largest key t in [low, high) whose F(t) = weight of all elements with keys >= t reaches `wanted`; all are below high.

    Gives t (low, if none does), F(t + 1), how many elements [low, high) has, and what the list holds now: (first key, end, number).
    total: how many they are, -1 if not known; the list has them if they fit. If they do not, a pass looks at four keys between,
    three at equal distances in logits and, lest tails take long, the middle one in keys, until what is left between two fits.
    """
    if total < 0:
        total = _collect(low, high, elements, lists, width, LOAD, source, GROUP)
    count = tl.where(total <= FILTER_LIST, total, -1)
    number, beyond = total, total * 0  # elements with keys >= low, >= high
    above = tl.zeros((), tl.int64)
    quarter = tl.arange(0, 4)
    least = top - 40.0 / scale  # below it elements have no sum of exponentials
    while (count < 0) & (high - low > 1):
        left = tl.maximum(tl.where(low > 0, _unordered(tl.maximum(low, LOWEST)), least), least)
        x = left + (_unordered(high - 1) - left) * ((quarter + 1).to(tl.float32) * 0.25)
        t = tl.where(quarter == 3, low + (high - low) // 2, ordered(x))
        t = tl.minimum(tl.maximum(t, low + 1), high - 1)
        numbers, sums = _reaching(t, elements, width, top, scale, LOAD, source, BY_SUMEXP, GROUP)
        enough = sums >= wanted
        low = tl.max(tl.where(enough, t, low), axis=0)
        high = tl.min(tl.where(enough, high, t), axis=0)
        number = tl.min(tl.where(enough, numbers, number), axis=0)
        beyond = tl.max(tl.where(enough, beyond, numbers), axis=0)
        above = tl.max(tl.where(enough, above, sums), axis=0)
        if number - beyond <= FILTER_LIST:
            count = _collect(low, high, elements, lists, width, LOAD, source, GROUP)
    found = low
    if count >= 0:
        keys, ids = _list(lists[0], lists[1], count)
        weights = _weights(keys, top, scale, BY_SUMEXP)
        end = high
        while end - found > 1:
            middle = found + (end - found) // 2
            reaches = above + tl.sum(tl.where(keys >= middle, weights, 0), axis=0) >= wanted
            found = tl.where(reaches, middle, found)
            end = tl.where(reaches, end, middle)
        above += tl.sum(tl.where(keys > found, weights, 0), axis=0)
    return found, above, total, (low, high, count)


@triton.jit
def _sumexp_above(t, total, elements, lists, width, top, scale, LOAD: tl.constexpr, source, GROUP: tl.constexpr):
    """Sum of exponentials of the elements with keys above t, from the list if it holds them all."""
    groups_ptr, num_groups = elements
    keys_ptr, ids_ptr = lists
    sumexp = tl.zeros((), tl.int64)
    if total <= FILTER_LIST:
        keys, ids = _list(keys_ptr, ids_ptr, total)
        sumexp += tl.sum(tl.where(keys > t, _weights(keys, top, scale, True), 0), axis=0)
    else:
        for b in range(tl.cdiv(num_groups, FILTER_LIST // GROUP)):
            keys, ids = _block(b, groups_ptr, num_groups, width, LOAD, source, GROUP)
            sumexp += tl.sum(tl.where(keys > t, _weights(keys, top, scale, True), 0), axis=0)
    return sumexp


@triton.jit
def _place(keys, ids, t, seen, ties):
    """Id of the (ties - seen)-th element whose key is t among those here, -1 for none, and how many have it."""
    same = tl.where(keys == t, 1, 0)
    rank = seen + tl.cumsum(same, axis=0)
    return tl.max(tl.where((same == 1) & (rank <= ties), ids, -1), axis=0), tl.sum(same, axis=0)


@triton.jit
def _cut(t, ties, held, elements, lists, width, LOAD: tl.constexpr, source, GROUP: tl.constexpr):
    """Id of the ties-th element, by id, whose key is t; -1 for none."""
    groups_ptr, num_groups = elements
    keys_ptr, ids_ptr = lists
    low, high, count = held
    cut = tl.full((), -1, tl.int32)
    if ties > 0:
        if (count >= 0) & (t >= low) & (t < high):
            keys, ids = _list(keys_ptr, ids_ptr, count)
            cut, _ = _place(keys, ids, t, 0, ties)
        else:
            seen = tl.zeros((), tl.int32)
            for b in range(tl.cdiv(num_groups, FILTER_LIST // GROUP)):
                keys, ids = _block(b, groups_ptr, num_groups, width, LOAD, source, GROUP)
                last, here = _place(keys, ids, t, seen, ties)
                cut = tl.maximum(cut, last)
                seen += here
    return cut


@triton.jit
def filter_row(LOAD: tl.constexpr, source, width, group_max_ptr, num_groups, groups_ptr, keys_ptr, ids_ptr,
               top, sumexp, scale, top_k, top_p, min_p,
               JOINT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """(threshold int64, cut int32, number of groups that can hold kept ids, listed at groups_ptr in ascending order).

    LOAD(ids, inside, source): fp32 logits of ids [BLOCK], NaN read as -inf. group_max_ptr: fp32 [num_groups], maxima of
    GROUP neighbouring ids. Scratch: groups_ptr int32 [num_groups], keys_ptr and ids_ptr int32 [BLOCK]. top: the row's maximum,
    finite; sum of exponentials: int64, its sum of exponentials, 2^40 for the maximum; scale = log2(e) / temperature. JOINT: top_k
    and top_p are both tested on the whole distribution, else top_p on what top_k blocks. GROUPS: a power of two >= num_groups. Call
    where `filter_is_on`."""
    use_k = (top_k > 0) & (top_k < width)
    use_p = top_p < 1.0
    use_min = min_p > 0.0
    after_k = use_k & use_p
    if JOINT:
        after_k = after_k & (width < 0)
    wanted = tl.maximum((sumexp.to(tl.float32) * top_p).to(tl.int64), 1)  # sum of exponentials that top_p has to reach

    # min_p: the largest key that fails.
    fails = tl.zeros((), tl.int64)
    if use_min:
        least = tl.log2(tl.minimum(min_p, 1.0))
        for bit in range(32):
            t = fails | (tl.full((), 1, tl.int64) << (31 - bit))
            fails = tl.where((_unordered(t) - top) * scale >= least, fails, t)

    # Bounds from the group maxima.
    group = tl.arange(0, GROUPS)
    maxima = tl.load(group_max_ptr + group, mask=group < num_groups, other=NEG_INF, volatile=True)
    group_keys = tl.where(maxima > NEG_INF, ordered(maxima), 0)
    group_sumexp = tl.where(maxima > NEG_INF, _sumexp(maxima, top, scale), 0)
    bound_k = tl.zeros((), tl.int64)
    bound_p = tl.zeros((), tl.int64)
    for bit in range(32):
        one = tl.full((), 1, tl.int64) << (31 - bit)
        number = tl.sum(tl.where(group_keys >= (bound_k | one), 1, 0), axis=0)
        bound_k = tl.where(number >= top_k, bound_k | one, bound_k)
        reached = tl.sum(tl.where(group_keys >= (bound_p | one), group_sumexp, 0), axis=0)
        bound_p = tl.where(reached >= wanted, bound_p | one, bound_p)
    bound = tl.maximum(tl.where(use_k, bound_k, 0), tl.where(use_p, tl.where(after_k, 0, bound_p), 0))
    # Where top_p counts what top_k blocks, elements that min_p removes later still count.
    bound = tl.maximum(tl.maximum(bound, tl.where(after_k, 0, fails + 1)), 1)
    reach = group_keys >= bound
    num_reached = tl.sum(reach.to(tl.int32), axis=0)
    tl.store(groups_ptr + tl.cumsum(reach.to(tl.int32), axis=0) - 1, group, mask=reach)
    tl.debug_barrier()

    # Threshold and number of ties kept there, the strictest of the filters.
    elements, lists = (groups_ptr, num_reached), (keys_ptr, ids_ptr)
    low, high = tl.where(bound > 1, bound, 0), ordered(top) + 1
    total = tl.full((), -1, tl.int32)
    held = (low, high, total)
    threshold = fails
    ties = tl.zeros((), tl.int32)
    if use_k:
        t, above, total, held = _largest(
            top_k.to(tl.int64), low, high, total, elements, lists, width, top, scale, LOAD, source, False, GROUP
        )
        kept_ties = top_k - above.to(tl.int32)
        if after_k:
            sumexp_above = _sumexp_above(t, total, elements, lists, width, top, scale, LOAD, source, GROUP)
            least_sumexp = tl.where(t > 0, _sumexp(_unordered(tl.maximum(t, LOWEST)), top, scale), 0)
            wanted = tl.maximum(((sumexp_above + kept_ties * least_sumexp).to(tl.float32) * top_p).to(tl.int64), 1)
        ties = tl.where(t > threshold, kept_ties, ties)
        threshold = tl.maximum(t, threshold)
    if use_p:
        t, above, total, held = _largest(wanted, low, high, total, elements, lists, width, top, scale, LOAD, source, True, GROUP)
        least_sumexp = tl.maximum(_sumexp(_unordered(tl.maximum(t, LOWEST)), top, scale), 1)
        # The token that crosses is kept, and at least one always is.
        kept_ties = tl.minimum((tl.maximum(wanted - above, 1) + least_sumexp - 1) // least_sumexp, 2147483647).to(tl.int32)
        ties = tl.where(t > threshold, kept_ties, tl.where(t == threshold, tl.minimum(ties, kept_ties), ties))
        threshold = tl.maximum(t, threshold)
    cut = _cut(threshold, ties, held, elements, lists, width, LOAD, source, GROUP)
    return threshold, cut, num_reached


@triton.jit
def sums_in_support(LOAD: tl.constexpr, source, width, groups_ptr, num_reached, threshold, cut, block_max_ptr, block_sumexp_ptr,
                num_blocks, scale, GROUP: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Block sums of a row again, of the kept ids alone: a kept block's maximum is kept, so they stay relative to it. What a block
    showed stays.

    groups_ptr, num_reached, threshold, cut: from `filter_row`. block_max_ptr fp32, block_sumexp_ptr int64 [num_blocks].
    """
    TILE: tl.constexpr = FILTER_LIST // GROUP
    block = tl.arange(0, BLOCKS)
    seen = tl.load(block_sumexp_ptr + block, mask=block < num_blocks, other=0, volatile=True) & ~SUMEXP_BITS
    tl.debug_barrier()
    tl.store(block_sumexp_ptr + block, seen, mask=block < num_blocks)
    tl.debug_barrier()
    for b in range(tl.cdiv(num_reached, TILE)):
        which = b * TILE + tl.arange(0, TILE)
        groups = tl.load(groups_ptr + which, mask=which < num_reached, other=0)
        blocks = groups * GROUP // VOCAB_BLOCK
        tops = tl.load(block_max_ptr + blocks, mask=which < num_reached, other=NEG_INF, volatile=True)
        ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (which < num_reached)[:, None] & (ids < width)
        x = tl.reshape(LOAD(tl.reshape(ids, [FILTER_LIST]), tl.reshape(inside, [FILTER_LIST]), source), [TILE, GROUP])
        e = tl.where(inside & kept(x, ids, threshold, cut), tl.exp2(below_max(x, tops[:, None]) * scale), 0.0)
        tl.atomic_add(block_sumexp_ptr + blocks, fixed_sums(e, TILE, GROUP, SUMEXP_ONE), mask=which < num_reached, sem="relaxed")
    tl.debug_barrier()
