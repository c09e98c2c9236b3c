"""Launch configuration of the row layouts."""

from __future__ import annotations

import dataclasses

from ..arch import Arch
from ..table import find


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """block: rows per program."""

    block: int
    num_warps: int


def pick(arch: Arch, requests: int) -> LayoutConfig:
    """The configuration for `requests` requests."""
    if arch.vendor == "interpreter":
        return LayoutConfig(4096, 1)
    return LayoutConfig(**find(arch, "layout", requests=requests).config)
