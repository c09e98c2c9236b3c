"""Which request an entry of a packed list belongs to, and what is known of that.

An exchange between threads costs two barriers whatever it moves, so what is asked for together is exchanged together.
"""

import triton
import triton.language as tl


@triton.jit
def owner_of(ends, n, REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the sorted `ends` [REQUESTS] are at or before n [BLOCK], at most REQUESTS - 1: by bisection."""
    found = tl.zeros([BLOCK], tl.int32)
    for halving in tl.static_range(LOG_REQUESTS):
        last = found + ((REQUESTS >> (halving + 1)) - 1)
        found = tl.where(tl.gather(ends, last, axis=0) <= n, last + 1, found)
    return found


@triton.jit
def owners_of(ends, other_ends, n, REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    """`owner_of` for two lists of ends at once: (owner, other owner), each [BLOCK]."""
    both = tl.reshape(tl.join(ends, other_ends), [2 * REQUESTS])
    which = tl.arange(0, 2)[None, :]
    found = tl.zeros([BLOCK, 2], tl.int32)
    for halving in tl.static_range(LOG_REQUESTS):
        last = found + ((REQUESTS >> (halving + 1)) - 1)
        end = tl.reshape(tl.gather(both, tl.reshape(2 * last + which, [2 * BLOCK]), axis=0), [BLOCK, 2])
        found = tl.where(end <= n[:, None], last + 1, found)
    return tl.split(found)


@triton.jit
def gather_fields(fields, owners):
    """Eight int32 fields of requests [REQUESTS], each of an owner of its own per entry [BLOCK], in one exchange. Returns eight."""
    rows = _joined(fields)
    indices = _joined(owners)
    REQUESTS: tl.constexpr = rows.shape[0]
    BLOCK: tl.constexpr = indices.shape[0]
    places = tl.reshape(indices * 8, [BLOCK, 8]) + tl.arange(0, 8)[None, :]
    found = tl.gather(tl.reshape(rows, [8 * REQUESTS]), tl.reshape(places, [8 * BLOCK]), axis=0)
    even, odd = tl.split(tl.reshape(found, [BLOCK, 2, 2, 2]))
    of_04, of_26 = tl.split(even)
    of_15, of_37 = tl.split(odd)
    of_0, of_4 = tl.split(of_04)
    of_1, of_5 = tl.split(of_15)
    of_2, of_6 = tl.split(of_26)
    of_3, of_7 = tl.split(of_37)
    return of_0, of_1, of_2, of_3, of_4, of_5, of_6, of_7


@triton.jit
def _joined(eight):
    """[..., 2, 2, 2] of eight blocks, by the bits of their number."""
    even = tl.join(tl.join(eight[0], eight[4]), tl.join(eight[2], eight[6]))
    odd = tl.join(tl.join(eight[1], eight[5]), tl.join(eight[3], eight[7]))
    return tl.join(even, odd)
