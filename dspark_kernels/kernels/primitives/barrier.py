"""A barrier over all programs of a cooperative launch, on one int32 word that needs no reset between launches.

Every program adds 1 and the leader adds 2^31 - (n - 1), so a round always adds exactly 2^31: the sign bit flips when the
last one arrives and the low bits return to zero. All programs must be resident (`launch_cooperative_grid=True`). A grid of one
program, which is how the interpreter runs, has nobody to wait for, but its warps still wait for each other.
"""

import triton
import triton.language as tl

from .fence import stores_done


@triton.jit
def grid_barrier(barrier_ptr):
    programs = tl.num_programs(0)
    stores_done()
    if programs > 1:
        step = tl.where(tl.program_id(0) == 0, 2147483647 - programs + 2, 1).to(tl.int32)
        before = tl.atomic_add(barrier_ptr, step, sem="release", scope="gpu")
        now = before
        while (before ^ now) >= 0:
            now = tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
