"""State slots of batch rows, and the request that an entry of a packed list belongs to."""

import triton
import triton.language as tl


@triton.jit
def state_slots(slots_ptr, requests, num_requests, num_slots):
    """int64 slot per request, -1 beyond the batch, for a padding row, or for an index that names no slot.

    slots_ptr: int32 [R], or None where a request's slot is its row.
    """
    inside = requests < num_requests
    if slots_ptr is None:
        slots = tl.where(inside, requests, -1).to(tl.int64)
    else:
        slots = tl.load(slots_ptr + requests, mask=inside, other=-1).to(tl.int64)
        slots = tl.where((slots >= 0) & (slots < num_slots), slots, -1)
    return slots


@triton.jit
def owner_of(ends, n, REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the sorted `ends` [REQUESTS] are at or before n [BLOCK], at most REQUESTS - 1: by bisection."""
    found = tl.zeros([BLOCK], tl.int32)
    for halving in tl.static_range(LOG_REQUESTS):
        last = found + ((REQUESTS >> (halving + 1)) - 1)
        found = tl.where(tl.gather(ends, last, axis=0) <= n, last + 1, found)
    return found
