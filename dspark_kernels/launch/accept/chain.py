"""Launch configuration of chain acceptance."""

from __future__ import annotations

import dataclasses

from ..arch import Arch
from ..table import find


@dataclasses.dataclass(frozen=True)
class AcceptConfig:
    """group x chunk: rows x blocks of 1024 ids of a work item; more than one row only where an item covers whole rows. lag:
    requests by which the second phase follows the first. max_registers: per thread, None = the compiler's choice. num_stages: of
    loads before a dot.
    """

    group: int
    chunk: int
    lag: int
    num_warps: int
    max_registers: int | None
    num_stages: int = 3


def pick(arch: Arch, num_blocks: int, num_drafts: int, heavy: bool, adjusted: bool = False,
         filtered: bool = False) -> AcceptConfig:  # fmt: skip
    """The configuration for rows of `num_blocks` blocks.

    heavy: whether fp32 logits, sparse proposals or draft rows that are read again take more registers. adjusted, filtered: whether
    penalties, bias or masks change logits, and whether there are filters; the tiles of both are spread over eight warps.

    An item has four blocks: at V = 151936 a row is 38 items, so one request with 7 drafts gives 304 items, more than two per
    multiprocessor of any GPU in launch/arch.py but the largest. Without a limit ptxas spills in the tails, to keep more programs
    resident than the loads in flight need; the limits are the smallest at which no architecture spills (bench/compile).
    """
    if arch.vendor == "interpreter":
        # It pays per operation, not per element: as few, large items as the grid of small vocabularies allows.
        tuned = dict(pairs=16, lag=2, num_warps=4, max_registers=None)
    else:
        tuned = dict(find(arch, "accept", law="wide" if adjusted or filtered else "heavy" if heavy else "light").config)
    pairs = tuned.pop("pairs")
    chunk = min(pairs, 1 << (num_blocks - 1).bit_length())
    group = min(pairs // chunk, 1 << num_drafts.bit_length()) if chunk >= num_blocks else 1
    return AcceptConfig(group, chunk, **tuned)
