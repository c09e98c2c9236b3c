"""Which request an entry of a packed list belongs to."""

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
