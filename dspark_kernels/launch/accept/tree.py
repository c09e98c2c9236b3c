"""Launch configuration of tree acceptance."""

from __future__ import annotations

import dataclasses

from ..arch import Arch


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """group x chunk: nodes x blocks of 1024 ids of a work item; more than one node only where an item covers whole rows. tile x
    span: blocks at once x steps of an item of a sweep. max_registers: per thread, None = the compiler's choice.
    """

    group: int
    chunk: int
    tile: int
    span: int
    num_warps: int
    max_registers: int | None


def pick(arch: Arch, num_blocks: int, num_nodes: int, sweeps: bool, settings: bool = False) -> TreeConfig:
    """The configuration for rows of `num_blocks` blocks. Not measured on a GPU yet.

    Items of the first phase are those of launch/accept/chain.py. A sweep has fewer and larger items, because all M - 1 possible
    sweeps are launched and most of them end at once. Its tile is smaller, because target and draft are in registers at the same
    time. With sweeps, items of several nodes spill on sm_80 (bench/compile). Settings that change logits take half as many elements
    per thread and every register.
    """
    interpreted = arch.vendor == "interpreter"
    pairs = 16 if interpreted else 4
    chunk = min(pairs, 1 << (num_blocks - 1).bit_length())
    grouped = chunk >= num_blocks and (interpreted or not sweeps)
    group = min(pairs // chunk, 1 << (num_nodes - 1).bit_length()) if grouped else 1
    tile = min(pairs if interpreted else 2, 1 << (num_blocks - 1).bit_length())
    span = min(16 // tile, -(-num_blocks // tile))
    limit = 255 if settings and arch.vendor == "nvidia" else None
    return TreeConfig(group, chunk, tile, span, num_warps=8 if settings else 4, max_registers=limit)
