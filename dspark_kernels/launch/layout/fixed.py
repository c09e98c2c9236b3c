"""Launch configuration of the row layouts."""

from __future__ import annotations

import dataclasses

from ..arch import Arch
from ..table import find


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """block: rows per program. max_registers: per thread; None = the compiler's choice, which spills on sm_90 for 1024 requests."""

    block: int
    num_warps: int
    max_registers: int | None = None


def _padded(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def pick(arch: Arch, requests: int, rows: int = 1 << 30) -> LayoutConfig:
    """The configuration for `requests` requests, whose rows are padded to `rows`."""
    if arch.vendor == "interpreter":
        return LayoutConfig(min(4096, _padded(rows)), 1)
    config = LayoutConfig(**find(arch, "layout", requests=requests).config)
    return dataclasses.replace(
        config, block=min(config.block, _padded(rows)), max_registers=255 if arch.vendor == "nvidia" else None
    )
