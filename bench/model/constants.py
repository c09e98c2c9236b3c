"""What the model assumes: GPUs, and how long their steps take. Three values each: optimistic, central, pessimistic.

Refit these, and nothing else, when a GPU has measured something: none of the times was measured by this project. Latencies are
assumed for a GPU under load, where a load takes 550 to 800 ns and an atomic up to a microsecond; of an idle GPU see the
microbenchmarks of Ampere, Ada and Hopper in arXiv 2402.13499. What else is assumed:

    launch      a kernel of a CUDA graph, from the end of the kernel before it to its first instruction
    start       of a program on a multiprocessor: its arguments, its first instructions
    issued      share of the issue slots that a loop full of arithmetic reaches
    pace        cycles per instruction of a serial part, of one warp, its operands at hand or a few cycles away
    spin        a wait for a word that another program writes, beyond the time until that is written
"""

from __future__ import annotations

from typing import NamedTuple

from bench.shared import roofline
from dspark_kernels.launch.arch import KNOWN


class Range(NamedTuple):
    optimistic: float
    central: float
    pessimistic: float


LEVELS = Range._fields


class Machine(NamedTuple):
    """clock: GHz under load. bandwidth: bytes per second of a device copy."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float


# Bandwidth: of an H200 what a copy was measured to move (bench/shared/roofline.py), else 90 % of the data sheet's. Clocks: under
# load, somewhat below the highest; assumed.
MACHINES = {
    "sm_80": Machine("A100-80", KNOWN["sm_80"].multiprocessors, 1.41, 1.75e12),
    "sm_86": Machine("A40", KNOWN["sm_86"].multiprocessors, 1.7, 0.63e12),
    "sm_89": Machine("L40S", KNOWN["sm_89"].multiprocessors, 2.3, 0.78e12),
    "sm_90": Machine("H200", KNOWN["sm_90"].multiprocessors, 1.7, roofline.Machine().bytes_per_second),
    "sm_100": Machine("B200", KNOWN["sm_100"].multiprocessors, 1.8, 7.2e12),
    "sm_120": Machine("RTX 5090", KNOWN["sm_120"].multiprocessors, 2.3, 1.6e12),
}

# Microseconds.
LAUNCH = Range(1.5, 2.0, 2.5)
START = Range(0.15, 0.25, 0.4)
DRAM = Range(0.55, 0.7, 0.8)
L2 = Range(0.2, 0.3, 0.6)
ATOMIC = Range(0.4, 0.55, 1.0)
FENCE = Range(0.3, 0.45, 0.7)
SPIN = Range(0.2, 0.3, 0.5)
BARRIER = Range(0.02, 0.03, 0.05)

# Cycles.
ARITHMETIC = Range(4, 5, 6)
SPECIAL = Range(18, 22, 30)
EXCHANGE = Range(22, 25, 30)
SHARED = Range(23, 30, 35)
TENSOR = Range(24, 33, 40)
PACE = Range(2.0, 3.0, 4.0)

ISSUED = Range(0.9, 0.75, 0.6)
# Cycles that a warp's instruction keeps a quarter of a multiprocessor's pipe busy (CUDA guide, throughput of instructions): 16
# special functions a clock, 32 lanes a clock of shared memory and shuffles.
PIPES = {"special": 8, "shared": 4, "exchange": 4}
