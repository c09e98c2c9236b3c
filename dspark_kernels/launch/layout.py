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
    """The configuration for `requests` requests. Not measured on a GPU yet."""
    if arch.vendor == "interpreter":
        return LayoutConfig(4096, 1)
    return LayoutConfig(128 if requests <= 512 else 256, 4 if requests <= 512 else 8)
