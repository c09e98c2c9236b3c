"""Launch configuration of the row layouts."""

from __future__ import annotations

import dataclasses

from .arch import Arch


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """block: rows per program."""

    block: int
    num_warps: int


def pick(arch: Arch, requests: int) -> LayoutConfig:
    """The configuration for `requests` requests. Not measured on a GPU yet.

    The owner search compares block x requests pairs: the block shrinks as the batch grows, so that they stay in registers.
    """
    if arch.vendor == "interpreter":
        return LayoutConfig(min(1024, max(16, (1 << 18) // max(1, requests))), 1)
    return LayoutConfig(max(8, min(128, 8192 // max(1, requests))), 4)
