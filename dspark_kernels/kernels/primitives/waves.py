"""Work in waves, in one launch without a grid barrier: an item of a wave waits until all items of earlier waves are done.

Items are taken by tickets, not program ids, so that everything an item waits for was taken before it, by a program that runs or
has run: no deadlock for any grid, and none where programs run one after another.
"""

import triton
import triton.language as tl

from .fence import stores_done


@triton.jit
def take_item(ticket_ptr):
    """The number of this program's item."""
    return tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def wait_for(finished_ptr, items):
    """Until the first `items` items are finished; what they stored is visible then."""
    if items > 0:
        done = tl.atomic_add(finished_ptr, 0, sem="acquire", scope="gpu")
        while done < items:
            done = tl.atomic_add(finished_ptr, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()


@triton.jit
def finish_item(ticket_ptr, finished_ptr, items):
    """This program's item is done; the last of all `items` puts the counters back to zero."""
    stores_done()
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu") == items - 1:
        tl.store(ticket_ptr, 0)
        tl.store(finished_ptr, 0)
