"""Last arriver finishes: programs that reduce parts take a ticket, and the one that gets the last ticket does the rest.

No barrier and no co-residency is needed; the counter is put back to zero for the next launch by the last arriver itself.
"""

import triton
import triton.language as tl

from .fence import stores_done


@triton.jit
def arrive(counter_ptr, parts):
    """True for the last of `parts` programs; everything the others stored before arriving is visible to it."""
    stores_done()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last
