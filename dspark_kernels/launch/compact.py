"""Launch configuration of the compaction of caches."""

from __future__ import annotations

import dataclasses

from .arch import Arch


@dataclasses.dataclass(frozen=True)
class CompactConfig:
    """rows x chunk: cache slots x units of a slot that a program copies at once."""

    rows: int
    chunk: int
    num_warps: int


def pick(arch: Arch, width: int) -> CompactConfig:
    """The configuration for cache slots of up to `width` units. Not measured on a GPU yet.

    An accepted path is rarely longer than eight tokens, and 2 KB (8 heads of 128 in bf16) are 256 units of 8 bytes. Eight such
    slots are 16 KB in flight per program, and there are two programs per layer and request.
    """
    wide = 1 << max(0, width - 1).bit_length()
    if arch.vendor == "interpreter":
        return CompactConfig(16, min(wide, 4096), 1)
    return CompactConfig(8, min(wide, 256), 4)
