"""top-k, top-p and min-p of a row of logits as two scalars: kept <=> key > threshold, or key = threshold and id <= cut.

key = ordered bits of the fp32 logit. Every filter keeps a prefix of the order (key descending, id ascending), so the strictest
wins. The maxima of groups of ids bound the threshold from below (top-k: the k-th largest maximum; top-p: the
largest t whose maxima alone carry p of the mass), so only groups that reach the bound are read again; a bitwise search
over their elements finds it exactly. Masses are integers, 2^40 for the row's maximum, so that the result does not depend on tiles.
Oracle: reference/sampling.py. Nothing of the size of a row is written.
"""

import triton
import triton.language as tl

from .mass import LEAF, NEG_INF, ONE, below_max, masses

EVERYTHING = tl.constexpr(0)  # a threshold below every key
BLOCK = tl.constexpr(1024)  # elements that one step looks at; as many are kept in a list


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
def _mass(x, top, scale):
    return (tl.exp2(below_max(x, top) * scale) * ONE).to(tl.int64)


@triton.jit
def _block(b, listed, keys_ptr, ids_ptr, groups_ptr, count, width, LOAD: tl.constexpr, source, GROUP: tl.constexpr):
    """Keys (0 = none) and ids of BLOCK elements: from the list where all fitted in it, else from the groups again."""
    TILE: tl.constexpr = BLOCK // GROUP
    offsets = b * BLOCK + tl.arange(0, BLOCK)
    if listed:
        inside = offsets < count
        keys = tl.load(keys_ptr + offsets, mask=inside, other=0).to(tl.int64) + 2147483648
        keys = tl.where(inside, keys, 0)
        ids = tl.load(ids_ptr + offsets, mask=inside, other=0)
    else:
        which = b * TILE + tl.arange(0, TILE)
        groups = tl.load(groups_ptr + which, mask=which < count, other=0)
        ids = tl.reshape(groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [BLOCK])
        inside = tl.reshape((which < count)[:, None] & (tl.arange(0, GROUP) >= 0)[None, :], [BLOCK]) & (ids < width)
        x = LOAD(ids, inside, source)
        keys = tl.where(inside & (x > NEG_INF), ordered(x), 0)
    return keys, ids


@triton.jit
def _at_least(t, blocks, listed, keys_ptr, ids_ptr, groups_ptr, count, width, top, scale, LOAD: tl.constexpr, source,
              GROUP: tl.constexpr):  # fmt: skip
    """Number and mass of the elements whose key is t or more (t >= 1)."""
    number = tl.zeros((), tl.int32)
    mass = tl.zeros((), tl.int64)
    for b in range(blocks):
        keys, ids = _block(b, listed, keys_ptr, ids_ptr, groups_ptr, count, width, LOAD, source, GROUP)
        number += tl.sum(tl.where(keys >= t, 1, 0), axis=0)
        mass += tl.sum(tl.where(keys >= t, _mass(_unordered(keys), top, scale), 0), axis=0)
    return number, mass


@triton.jit
def _cut(t, ties, blocks, listed, keys_ptr, ids_ptr, groups_ptr, count, width, LOAD: tl.constexpr, source, GROUP: tl.constexpr):
    """Id of the ties-th element, by id, whose key is t; -1 for none."""
    seen = tl.zeros((), tl.int32)
    cut = tl.full((), -1, tl.int32)
    for b in range(blocks):
        keys, ids = _block(b, listed, keys_ptr, ids_ptr, groups_ptr, count, width, LOAD, source, GROUP)
        same = tl.where(keys == t, 1, 0)
        rank = seen + tl.cumsum(same, axis=0)
        cut = tl.maximum(cut, tl.max(tl.where((same == 1) & (rank <= ties), ids, -1), axis=0))
        seen += tl.sum(same, axis=0)
    return cut


@triton.jit
def filter_row(LOAD: tl.constexpr, source, width, group_max_ptr, num_groups, groups_ptr, keys_ptr, ids_ptr,
               top, mass, scale, top_k, top_p, min_p, JOINT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """(threshold int64, cut int32, number of groups that can hold kept ids, listed at groups_ptr in ascending order).

    LOAD(ids, inside, source): fp32 logits of ids [BLOCK], NaN read as -inf. group_max_ptr: fp32 [num_groups], maxima of
    GROUP neighbouring ids. Scratch: groups_ptr int32 [num_groups], keys_ptr and ids_ptr int32 [BLOCK]. top: the row's maximum,
    finite; mass: int64, its sum of exponentials, 2^40 for the maximum; scale = log2(e) / temperature. JOINT: top_k and top_p are
    both judged on the whole law, else top_p on what top_k leaves. GROUPS: a power of two >= num_groups. Call where `filter_is_on`.
    """
    use_k = (top_k > 0) & (top_k < width)
    use_p = top_p < 1.0
    use_min = min_p > 0.0
    after_k = use_k & use_p
    if JOINT:
        after_k = after_k & (width < 0)
    wanted = tl.maximum((mass.to(tl.float32) * top_p).to(tl.int64), 1)  # mass that top_p has to reach

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
    group_masses = tl.where(maxima > NEG_INF, _mass(maxima, top, scale), 0)
    bound_k = tl.zeros((), tl.int64)
    bound_p = tl.zeros((), tl.int64)
    for bit in range(32):
        one = tl.full((), 1, tl.int64) << (31 - bit)
        number = tl.sum(tl.where(group_keys >= (bound_k | one), 1, 0), axis=0)
        bound_k = tl.where(number >= top_k, bound_k | one, bound_k)
        reached = tl.sum(tl.where(group_keys >= (bound_p | one), group_masses, 0), axis=0)
        bound_p = tl.where(reached >= wanted, bound_p | one, bound_p)
    bound = tl.maximum(tl.where(use_k, bound_k, 0), tl.where(use_p, tl.where(after_k, 0, bound_p), 0))
    # Where top_p counts what top_k leaves, elements that min_p removes later still count.
    bound = tl.maximum(tl.maximum(bound, tl.where(after_k, 0, fails + 1)), 1)
    reach = group_keys >= bound
    num_reached = tl.sum(reach.to(tl.int32), axis=0)
    tl.store(groups_ptr + tl.cumsum(reach.to(tl.int32), axis=0) - 1, group, mask=reach)
    tl.debug_barrier()

    # Elements that reach the bound, in a list if they fit.
    TILE: tl.constexpr = BLOCK // GROUP
    total = tl.zeros((), tl.int32)
    for b in range(tl.cdiv(num_reached, TILE)):
        keys, ids = _block(b, False, keys_ptr, ids_ptr, groups_ptr, num_reached, width, LOAD, source, GROUP)
        hit = (keys >= bound).to(tl.int32)
        place = total + tl.cumsum(hit, axis=0) - 1
        fits = (hit == 1) & (place < BLOCK)
        tl.store(keys_ptr + place, (keys - 2147483648).to(tl.int32), mask=fits)
        tl.store(ids_ptr + place, ids, mask=fits)
        total += tl.sum(hit, axis=0)
    tl.debug_barrier()
    listed = total <= BLOCK
    count = tl.where(listed, total, num_reached)
    blocks = tl.where(listed, 1, tl.cdiv(num_reached, TILE))

    # Threshold and number of ties kept there, the strictest of the filters. It lies between the bound and the row's maximum,
    # whose common leading bits need no search.
    differ = tl.maximum(ordered(top) ^ bound, 0)
    bits = tl.where(differ > 0, tl.floor(tl.log2(tl.maximum(differ, 1).to(tl.float32))).to(tl.int32) + 1, 0)
    common = (bound >> bits) << bits
    threshold = fails
    ties = tl.zeros((), tl.int32)
    if use_k:
        t = common
        for bit in range(bits):
            one = tl.full((), 1, tl.int64) << (bits - 1 - bit)
            number, reached = _at_least(t | one, blocks, listed, keys_ptr, ids_ptr, groups_ptr, count, width, top, scale,
                                        LOAD, source, GROUP)  # fmt: skip
            t = tl.where(number >= top_k, t | one, t)
        above, mass_above = _at_least(t + 1, blocks, listed, keys_ptr, ids_ptr, groups_ptr, count, width, top, scale,
                                      LOAD, source, GROUP)  # fmt: skip
        kept_ties = top_k - above
        if after_k:
            least_mass = tl.where(t > 0, _mass(_unordered(t), top, scale), 0)
            wanted = tl.maximum(((mass_above + kept_ties * least_mass).to(tl.float32) * top_p).to(tl.int64), 1)
        ties = tl.where(t > threshold, kept_ties, ties)
        threshold = tl.maximum(t, threshold)
    if use_p:
        t = common
        for bit in range(bits):
            one = tl.full((), 1, tl.int64) << (bits - 1 - bit)
            number, reached = _at_least(t | one, blocks, listed, keys_ptr, ids_ptr, groups_ptr, count, width, top, scale,
                                        LOAD, source, GROUP)  # fmt: skip
            t = tl.where(reached >= wanted, t | one, t)
        above, mass_above = _at_least(t + 1, blocks, listed, keys_ptr, ids_ptr, groups_ptr, count, width, top, scale,
                                      LOAD, source, GROUP)  # fmt: skip
        least_mass = tl.maximum(_mass(_unordered(t), top, scale), 1)
        # The token that crosses is kept, and at least one always is.
        kept_ties = tl.minimum((tl.maximum(wanted - mass_above, 1) + least_mass - 1) // least_mass, 2147483647).to(tl.int32)
        ties = tl.where(t > threshold, kept_ties, tl.where(t == threshold, tl.minimum(ties, kept_ties), ties))
        threshold = tl.maximum(t, threshold)
    cut = _cut(threshold, ties, blocks, listed, keys_ptr, ids_ptr, groups_ptr, count, width, LOAD, source, GROUP)
    return threshold, cut, num_reached


@triton.jit
def keep_masses(LOAD: tl.constexpr, source, width, groups_ptr, num_reached, threshold, cut, leaf_top_ptr, leaf_mass_ptr,
                num_leaves, scale, GROUP: tl.constexpr, LEAVES: tl.constexpr):  # fmt: skip
    """Leaf masses of a row again, of the kept ids alone: a kept leaf's maximum is kept, so they stay relative to it.

    groups_ptr, num_reached, threshold, cut: from `filter_row`. leaf_top_ptr fp32, leaf_mass_ptr int64 [num_leaves].
    """
    TILE: tl.constexpr = BLOCK // GROUP
    leaf = tl.arange(0, LEAVES)
    tl.store(leaf_mass_ptr + leaf, tl.zeros([LEAVES], tl.int64), mask=leaf < num_leaves)
    tl.debug_barrier()
    for b in range(tl.cdiv(num_reached, TILE)):
        which = b * TILE + tl.arange(0, TILE)
        groups = tl.load(groups_ptr + which, mask=which < num_reached, other=0)
        leaves = groups * GROUP // LEAF
        tops = tl.load(leaf_top_ptr + leaves, mask=which < num_reached, other=NEG_INF, volatile=True)
        ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (which < num_reached)[:, None] & (ids < width)
        x = tl.reshape(LOAD(tl.reshape(ids, [BLOCK]), tl.reshape(inside, [BLOCK]), source), [TILE, GROUP])
        e = tl.where(inside & kept(x, ids, threshold, cut), tl.exp2(below_max(x, tops[:, None]) * scale), 0.0)
        tl.atomic_add(leaf_mass_ptr + leaves, masses(e, TILE, GROUP, ONE), mask=which < num_reached, sem="relaxed")
    tl.debug_barrier()
