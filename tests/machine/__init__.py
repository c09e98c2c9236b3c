"""A machine that executes compiled Triton kernels (PTX) on a CPU, and sees races, missing fences and stray accesses. README.md says how."""

from .carries import DroppedCarry
from .core import Kernel, MachineError, Run, available
from .driver import install
from .launching import Launch, launches, record, replay_modes, replaying, reports, summary, totals
from .settings import GROUPS, MODES, Settings, settings, using

__all__ = [
    "GROUPS", "MODES", "DroppedCarry", "Kernel", "Launch", "MachineError", "Run", "Settings", "available", "install", "launches", "record",
    "replay_modes", "replaying", "reports", "settings", "summary", "totals", "using",
]  # fmt: skip
