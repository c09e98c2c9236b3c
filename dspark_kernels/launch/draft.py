"""Launch configuration of the dense draft block."""

from __future__ import annotations

import dataclasses

from .arch import Arch


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """block_v: ids per tile (a multiple of 128); block_r: ranks per dot; programs_per_sm: resident programs."""

    block_v: int
    block_r: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def pick(arch: Arch, vocab: int, rank: int, element_size: int) -> DraftConfig:
    """The configuration for W2 of [vocab, rank] with `element_size` bytes an element.

    Not measured on a GPU yet: the tile is the largest whose W2 block, twice (the next one is loaded while this one is
    used), fits in half of the shared memory.
    """
    padded_rank = max(16, 1 << max(0, rank - 1).bit_length())
    if arch.vendor == "interpreter":
        # One program walks everything: large tiles, because every operation costs the same whatever its size.
        return DraftConfig(min(4096, max(128, 1 << (vocab - 1).bit_length())), padded_rank, 1, 1, 1)
    block_r = min(padded_rank, 256 // max(1, element_size // 2))
    block_v = 256
    while block_v > 64 and 2 * block_v * block_r * element_size > arch.shared_memory // 2:
        block_v //= 2
    return DraftConfig(max(128, block_v), block_r, 8, 2, 1)
