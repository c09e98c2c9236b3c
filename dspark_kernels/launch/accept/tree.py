"""Launch configuration of tree acceptance."""

from __future__ import annotations

import dataclasses

from ..arch import Arch
from .items import steps


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """group x chunk: nodes x blocks of 1024 ids of a chunk, which is worked on at once; more than one node only where a chunk
    covers whole rows. tile x span: blocks at once x steps of an item of a sweep. max_registers: per thread, None = the compiler's
    choice. steps: chunks of a work item of the first phase, one after the other.
    """

    group: int
    chunk: int
    tile: int
    span: int
    num_warps: int
    max_registers: int | None
    steps: int = 1


def pick(arch: Arch, num_requests: int, num_blocks: int, num_nodes: int, sweeps: bool, settings: bool = False) -> TreeConfig:
    """The configuration for requests with rows of `num_blocks` blocks. Not measured on a GPU yet.

    Items of the first phase are those of launch/accept/chain.py. A sweep has fewer and larger items, because all M - 1 possible
    sweeps are launched and most of them end at once. Its tile is smaller, because target and draft are in registers at the same
    time. With sweeps, items of several nodes spill on sm_80 (bench/compile). Settings that change logits take half as many elements
    per thread and every register; on sm_120 the compiler would rather spill than give sweeps more than 128.
    """
    interpreted = arch.vendor == "interpreter"
    pairs = 16 if interpreted else 4
    chunk = min(pairs, 1 << (num_blocks - 1).bit_length())
    grouped = chunk >= num_blocks and (interpreted or not sweeps)
    group = min(pairs // chunk, 1 << (num_nodes - 1).bit_length()) if grouped else 1
    tile = min(pairs if interpreted else 2, 1 << (num_blocks - 1).bit_length())
    span = min(16 // tile, -(-num_blocks // tile))
    limit = 255 if settings and arch.vendor == "nvidia" else 168 if sweeps and arch.family == "sm_120" else None
    warps = 8 if settings else 4
    chunks = steps(arch, warps, limit, num_requests * -(-num_nodes // group), -(-num_blocks // chunk))
    return TreeConfig(group, chunk, tile, span, num_warps=warps, max_registers=limit, steps=chunks)
