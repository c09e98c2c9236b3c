"""What a program stored, by all of its warps, before it tells others.

A release by one thread covers the stores of its own warp, and on NVIDIA those of every warp that reached the barrier before
it. On AMD the barrier does not wait for stores on their way to L2, so each wave waits for its own first.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip


@triton.jit
def stores_done():
    """To be followed by a release from any one thread."""
    if is_hip():
        # A value for every lane of every wave, so that each of them executes the wait.
        lanes = tl.arange(0, 64)
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [lanes], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
