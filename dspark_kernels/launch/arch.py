"""The GPU a tensor lives on, as the launch configurations see it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Arch:
    """name: "sm_90", "gfx942", ... or "interpreter". shared_memory: bytes a program may use. multiprocessors: how many. vendor:
    "nvidia", "amd" or "interpreter"."""

    name: str
    shared_memory: int
    multiprocessors: int
    cooperative: bool = True
    vendor: str = dataclasses.field(init=False)  # no property: every launch asks several times

    def __post_init__(self) -> None:
        object.__setattr__(self, "vendor", {"s": "nvidia", "g": "amd"}.get(self.name[0], "interpreter"))

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 64 if self.vendor == "amd" else 32

    @property
    def family(self) -> str:
        """The known architecture whose rules apply: this one, or the nearest older one of its kind."""
        if self.vendor == "interpreter" or self.name in KNOWN:
            return self.name
        if self.vendor == "amd":
            return "gfx942"
        older = [name for name in KNOWN if name.startswith("sm_") and int(name[3:]) <= int(self.name[3:])]
        return max(older, key=lambda name: int(name[3:]), default="sm_86")


# Shared memory per program: CUDA programming guide, table "technical specifications per compute capability"; CDNA3 and CDNA4
# ISA guides for gfx942 (64 KiB) and gfx950 (160 KiB). Multiprocessors of the usual part, used only where no device can be asked.
KNOWN = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 163 * 1024, 108),
        Arch("sm_86", 99 * 1024, 84),
        Arch("sm_89", 99 * 1024, 142),
        Arch("sm_90", 227 * 1024, 132),
        Arch("sm_100", 227 * 1024, 148),
        Arch("sm_120", 99 * 1024, 170),
        Arch("gfx942", 64 * 1024, 304),
        Arch("gfx950", 160 * 1024, 256),
    )
}
INTERPRETER = Arch("interpreter", 1 << 30, 1, cooperative=False)

_override: Arch | None = None


@contextlib.contextmanager
def override(name: str) -> Iterator[Arch]:
    """Choose launch configurations for another architecture, to compile for it where it is not present."""
    global _override
    before, _override = _override, INTERPRETER if name == "interpreter" else KNOWN[name]
    try:
        yield _override
    finally:
        _override = before


def overridden() -> bool:
    return _override is not None


def current(device: torch.device) -> Arch:
    """The architecture of `device`; the interpreter for a CPU."""
    if _override is not None:
        return _override
    if device.type == "cpu":
        return INTERPRETER
    return _of_device(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _of_device(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(index)
        name = f"sm_{major}{minor}"
    known = KNOWN[Arch(name, 0, 0).family]
    return dataclasses.replace(known, name=name, multiprocessors=properties.multi_processor_count)
