"""Launch configuration of chain acceptance on vocabulary shards."""

from __future__ import annotations

import dataclasses

from ..arch import Arch


@dataclasses.dataclass(frozen=True)
class AcceptShardsConfig:
    """group x chunk: rows x blocks of 1024 ids of a work item of the first phase. block: pieces of vocabulary blocks that a
    decision loads at once. max_registers: per thread, None = the compiler's choice.
    """

    group: int
    chunk: int
    block: int
    num_warps: int
    max_registers: int | None


def pick(arch: Arch, num_blocks: int, num_drafts: int, adjusted: bool = False) -> AcceptShardsConfig:
    """The configuration for shards of `num_blocks` blocks. Not measured on a GPU yet.

    An item has four blocks, as for whole rows: with a vocabulary of 151936 ids on 8 ranks, each rank has 5 items per row. A thread
    may use every register, because fewer spill (bench/compile). adjusted: whether penalties, bias or masks change logits; their
    tiles are half as large and spread over twice the warps.
    """
    # The interpreter pays per operation, not per element: as few, large items as the grid of small vocabularies allows.
    pairs = 16 if arch.vendor == "interpreter" else 2 if adjusted else 4
    chunk = min(pairs, 1 << (num_blocks - 1).bit_length())
    group = min(pairs // chunk, 1 << num_drafts.bit_length()) if chunk >= num_blocks else 1
    registers = 255 if arch.vendor == "nvidia" else None
    return AcceptShardsConfig(group, chunk, 64, num_warps=8 if adjusted else 4, max_registers=registers)
