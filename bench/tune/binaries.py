"""What a configuration compiles to, and the time that predicts.

time = bytes / bandwidth * max(1, bandwidth * LATENCY / (multiprocessors * resident * bytes on the way per program))
"""

from __future__ import annotations

import dataclasses

import torch

from bench.shared import occupancy
from bench.tune.kernels import KERNELS
from dspark_kernels.launch import table
from dspark_kernels.launch.arch import Arch

LATENCY = 700e-9  # s from a load to its data, about; assumed
BANDWIDTH = {  # bytes per second on paper of the part whose multiprocessors launch/arch.py lists: vendors' data sheets
    "sm_80": 2.0e12, "sm_86": 0.77e12, "sm_89": 0.86e12, "sm_90": 4.8e12, "sm_100": 8.0e12, "sm_120": 1.79e12, "gfx942": 5.3e12,
    "gfx950": 8.0e12,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Binary:
    """What a configuration compiles to. spills: bytes of spill code and stack. case: the row of bench/results/compile.csv that
    has it, "" = compiled here."""

    registers: int
    spills: int
    shared: int
    shared_limit: int
    num_warps: int
    triton: str
    case: str = ""

    @classmethod
    def of(cls, row: dict, case: str = "") -> Binary:
        spills = sum(int(row[name]) for name in ("spill_stores", "spill_loads", "stack"))
        numbers = (int(row[name]) for name in ("shared", "shared_limit", "num_warps"))
        return cls(int(row["registers"]), spills, *numbers, row["triton"], case)

    @property
    def runs(self) -> bool:
        return self.spills == 0 and self.shared <= self.shared_limit

    def resident(self, arch: Arch) -> int:
        """Programs of which one multiprocessor can hold the registers, shared memory and warps."""
        return occupancy.resident(arch, self.registers, self.num_warps, self.shared)


def predicted(size: int, flight: int, binary: Binary, arch: Arch) -> float:
    """Microseconds for a case of `size` bytes."""
    bandwidth, resident = BANDWIDTH[arch.family], max(1, binary.resident(arch))
    return 1e6 * size / bandwidth * max(1.0, bandwidth * LATENCY / (arch.multiprocessors * resident * flight))


def compiled(kernel: str, shape: dict, config: dict, arch: str) -> Binary:
    """Compile one configuration offline, or find it in the compile report. Needs a process in which kernels are not interpreted."""
    from bench.shared.offline import calls
    from bench.shared.offline.capture import capture
    from bench.shared.offline.report import REPORT, read, row_of

    torch.set_num_threads(1)
    tuned = KERNELS[kernel]
    with table.trial(kernel, shape, config):
        with capture(arch, False) as launches:
            tuned.call(calls, shape)
        launch = launches[0]  # a form of several launches runs one binary again and again
        key = dict(op=tuned.op, arch=arch, source=launch.source, launch=launch.launch)
        for row in read(REPORT):
            if all(row[name] == value for name, value in key.items()):
                return Binary.of(row, f"{row['op']} {row['case']}")
        return Binary.of(row_of(arch, kernel, "trial", lambda: tuned.call(calls, shape), compiled=True))
