"""Request slots of batch rows."""

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
