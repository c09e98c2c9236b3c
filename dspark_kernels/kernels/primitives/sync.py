"""How programs of one launch tell each other that something is stored: a fence, a last-block counter, phases, a grid barrier.

A release by one thread covers the stores of its own warp, and on NVIDIA those of every warp that reached the barrier before
it. On AMD the barrier does not wait for stores on their way to L2, so each wavefront waits for its own first.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip


@triton.jit
def stores_done():
    """What a program stored, by all of its warps, before it tells others: to be followed by a release from any one thread."""
    if is_hip():
        # A value for every lane of every wavefront, so that each of them executes the wait.
        lanes = tl.arange(0, 64)
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [lanes], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


# --- last-block counter: programs that reduce parts count, and the one that arrives last does the rest -----------------


@triton.jit
def arrive(counter_ptr, parts):
    """True for the last of `parts` programs; everything the others stored before arriving is visible to it.

    No co-residency is needed; the last arriver itself puts the counter back to zero for the next launch.
    """
    stores_done()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def announce(counter_ptr):
    """One more part is done, for programs that wait for the counter (wait_for)."""
    stores_done()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


# --- phases without a grid barrier: a work item waits until all items of earlier phases are done -----------------------
# Items are taken by tickets, not program ids, so that everything an item waits for was taken before it, by a program that runs or
# has run: no deadlock for any grid, and none where programs run one after another.


@triton.jit
def take_item(ticket_ptr):
    """The number of this program's item."""
    return tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def wait_for(counter_ptr, least):
    """What a counter has once it is at least `least`; what was stored before it got there is visible then."""
    now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while now < least:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return now


@triton.jit
def finish_item(ticket_ptr, finished_ptr, items):
    """This program's item is done; the last of all `items` puts the counters back to zero."""
    stores_done()
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu") == items - 1:
        tl.store(ticket_ptr, 0)
        tl.store(finished_ptr, 0)


# --- grid barrier of a cooperative launch ------------------------------------------------------------------------------


@triton.jit
def grid_barrier(barrier_ptr):
    """All programs wait for each other, on one int32 word that needs no reset between launches.

    Every program adds 1 and the leader adds 2^31 - (n - 1), so a round always adds exactly 2^31: the sign bit flips when the
    last one arrives and the low bits return to zero. All programs must be resident (`launch_cooperative_grid=True`). A grid of one
    program, which is how the interpreter runs, has nobody to wait for, but its warps still wait for each other.
    """
    programs = tl.num_programs(0)
    stores_done()
    if programs > 1:
        step = tl.where(tl.program_id(0) == 0, 2147483647 - programs + 2, 1).to(tl.int32)
        before = tl.atomic_add(barrier_ptr, step, sem="release", scope="gpu")
        now = before
        while (before ^ now) >= 0:
            now = tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
