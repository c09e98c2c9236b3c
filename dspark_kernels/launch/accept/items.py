"""How rows of acceptance are cut into work items: chunks of vocabulary blocks that one program goes through one after the other."""

from __future__ import annotations

import functools

from ..arch import Arch

# Latency of a program's start and end (ticket, layout, first load, fence, arrival), in units of a chunk of 8 KB that it streams
# while its multiprocessor is full: 4 to 5 microseconds against 1. Modelled (bench/model), not measured on a GPU yet.
START = 4

REGISTERS, LANES = 65536, 32  # of a multiprocessor, of a warp


def steps(arch: Arch, num_warps: int, max_registers: int | None, groups: int, chunks: int) -> int:
    """Chunks of an item, for `groups` row groups of a batch, of `chunks` chunks each. Results do not depend on it.

    Few items fit into one round of resident programs; many short ones spend their time on starts, and of long ones the last round
    is the longer.
    """
    if arch.vendor == "interpreter":
        return min(2, chunks)  # tests see more than one, and a last item with fewer
    resident = REGISTERS // (LANES * num_warps * (max_registers or 128))  # by NVIDIA's sizes: AMD has twice the lanes and registers
    return _steps(arch.multiprocessors * max(1, resident), groups, chunks)


@functools.cache
def _steps(programs: int, groups: int, chunks: int) -> int:
    def time(count: int) -> int:
        rounds = -(-groups * -(-chunks // count) // programs)
        return rounds * (START + count) + count

    return min(range(1, chunks + 1), key=time)
