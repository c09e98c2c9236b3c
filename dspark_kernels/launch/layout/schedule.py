"""Launch configuration of the prefix scheduler."""

from __future__ import annotations

import dataclasses

from ..arch import Arch
from ..table import find


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """block: rows per program. sort: drafts that are sorted at a time, 8 or more. max_registers: per thread, None = the compiler's choice."""

    block: int
    sort: int
    num_warps: int
    max_registers: int | None


def pick(arch: Arch, candidates: int, rows: int) -> ScheduleConfig:
    """The configuration for `candidates` drafts (requests x drafts, each padded to a power of two).

    Every program schedules the whole batch by itself, so there are few programs: another one would only share the writing of rows.
    2048 drafts, a batch of 256 with 7 or 8 each, are sorted in one piece. A thread has a request and a row: with more warps a request
    would be spread over them, and with fewer rows than threads some would write nothing.
    """
    if arch.vendor == "interpreter":
        config = ScheduleConfig(1 << (rows - 1).bit_length(), 2048, 1, None)
    else:
        config = ScheduleConfig(**find(arch, "schedule", candidates=candidates, rows=rows).config)
    return dataclasses.replace(config, sort=min(candidates, config.sort))
