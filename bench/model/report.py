"""Rows of the model's report: what a kernel's hot part costs, and the time that predicts. All of it is MODELLED.

hot                       "loop" or "pass" (bench/model/hot.py has the rule)
tile, tile_from           elements of a turn, from the launch's "constants"; from its "loads" where these have other names now
per_element               instructions of all lanes per element: in all, and by class
others                    instructions of the loop that not every turn meets
barriers_per_8kb          block barriers per 8 KB that stream
must_move, moved          bytes: that must move once, counted by hand; that the lanes of all turns ask for, masks aside
programs, turns, waves    of the launch; turns per program; programs / programs that the GPU holds
*_us                      bench/model/estimate.py; floor and target as in bench.kernels
source, launch, ir        digests, as in bench/results/compile.csv
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.model import estimate
from bench.model.check import KEY, Digests
from bench.model.constants import MACHINES, Machine
from bench.model.flow import Flow
from bench.model.hot import Hot, find
from bench.model.ops import Kernel
from bench.model.sass import disassemble
from bench.shared import rows
from bench.shared.occupancy import resident
from bench.shared.offline.binary import inspect_binary
from bench.shared.offline.capture import Launch, capture
from bench.shared.paths import RESULTS
from dspark_kernels.launch.arch import KNOWN

FOLDER = RESULTS / "model"
REPORT, BASELINE = FOLDER / "h200.csv", FOLDER / "baseline.csv"
STATUS = "MODELLED"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report: an op at one shape on one architecture."""

    op: str
    case: str
    arch: str
    status: str
    gpu: str
    kernel: str
    hot: str
    element: str
    tile: float
    tile_from: str
    per_element: float
    fp: float
    integer: float
    special: float
    memory: float
    shared_memory: float
    exchange: float
    tensor: float
    barrier: float
    atomic: float
    control: float
    others: int
    barriers_per_8kb: float
    registers: int
    spills: int
    shared: int
    num_warps: int
    resident: int
    programs: int
    turns: float
    waves: float
    must_move: int
    moved: float
    turn_us: float
    life_us: float
    dram_us: float
    issue_us: float
    lives_us: float
    after_us: float
    low_us: float
    us: float
    high_us: float
    bound: str
    floor_us: float
    target_us: float | None
    source: str
    launch: str
    ir: str
    triton: str

    @property
    def label(self) -> str:
        return f"{self.op} {self.case}"


def captured(kernel: Kernel, arch: str, *, compiled: bool = False, ir: bool = False) -> Launch:
    """A kernel's launch; of a form of several launches the first, all of which are of one binary."""
    with capture(arch, compiled, ir) as launches:
        kernel.call()
    return launches[0]


def hot_part(kernel: Kernel, launch: Launch, flow: Flow) -> tuple[Hot, float, str]:
    """(hot part, elements of a turn, where these are from)."""
    lanes = 32 * launch.compiled.metadata.num_warps
    tile = _constant(kernel.tile, launch.constants)
    hot = find(flow, lanes, math.ceil(kernel.element_bytes * (tile or 1)))
    if tile is None:
        return hot, hot.streamed * lanes / kernel.element_bytes, "loads"
    return hot, tile, "constants"


def _constant(count: Callable[[Mapping], float], constants: Mapping) -> float | None:
    """What a record counts from a launch's constants, None where they have other names now."""
    try:
        return count(constants)
    except KeyError:
        return None


def row_of(kernel: Kernel, arch: str) -> Row:
    """Compile a kernel and model it. Raises ValueError where the hot part cannot be what the op's record says."""
    launch = captured(kernel, arch, compiled=True, ir=True)
    machine, case = MACHINES[arch], kernel.case
    binary, metadata = inspect_binary(launch.compiled), launch.compiled.metadata
    flow = Flow(disassemble(launch.compiled.asm["cubin"]))
    hot, tile, tile_from = hot_part(kernel, launch, flow)
    if not tile:
        raise ValueError(f"{case.op} {case.name}: the constants of its tile are gone (bench/model/ops.py), and nothing streams")
    warps = metadata.num_warps
    seats = resident(KNOWN[arch], binary["registers"], warps, metadata.shared)
    if not seats:
        raise ValueError(f"{case.op} {case.name}: {metadata.shared} bytes of shared memory do not fit {machine.name}")
    programs = math.prod(launch.grid)
    turns = kernel.turns or kernel.elements / ((programs - kernel.apart) * tile)
    load = estimate.Load(case.spec.bytes, programs - kernel.apart, turns, warps, seats, kernel.after)
    low, central, high = estimate.estimate(hot, load, machine)
    per = {kind: 32 * warps * count / tile for kind, count in hot.classes().items()}
    floor = 1e6 * case.spec.bytes / machine.bandwidth
    per["memory"], per["shared_memory"] = per.pop("global"), per.pop("shared")
    return Row(
        op=case.op, case=case.name, arch=arch, status=STATUS, gpu=machine.name, kernel=launch.kernel, hot=hot.how,
        element=kernel.element, tile=tile, tile_from=tile_from, per_element=sum(per.values()), **per, others=hot.others,
        barriers_per_8kb=hot.barriers * 8192 / (tile * kernel.element_bytes), registers=binary["registers"],
        spills=binary["spill_stores"] + binary["spill_loads"], shared=metadata.shared, num_warps=warps, resident=seats,
        programs=programs, turns=turns, waves=programs / (machine.multiprocessors * seats), must_move=case.spec.bytes,
        moved=hot.moved * 32 * warps * load.programs * turns, turn_us=central.turn, life_us=central.life, dram_us=central.dram,
        issue_us=central.issue, lives_us=central.lives, after_us=central.after, low_us=low.total, us=central.total,
        high_us=high.total, bound=central.bound, floor_us=floor, target_us=_limit(kernel, floor, machine),
        source=launch.source, launch=launch.launch, ir=launch.ir, triton=_triton(),
    )  # fmt: skip


def _limit(kernel: Kernel, floor: float, machine: Machine) -> float | None:
    """Microseconds that the project set as the op's target."""
    if kernel.case.target is None:
        return None
    lanes = machine.multiprocessors * 128 * machine.clock * 1e3  # fp32 instructions per microsecond
    return kernel.case.target.limit(floor, kernel.case.spec.instructions / lanes)


def _triton() -> str:
    import triton

    return triton.__version__


def lines(row: Row) -> str:
    """A row for the screen."""
    target = "" if row.target_us is None else f"{row.target_us:.0f}" if row.target_us >= 10 else f"{row.target_us:.1f}"
    span = f"{row.us:.0f} ({row.low_us:.0f}-{row.high_us:.0f})"
    return (
        f"{row.label:30}{row.hot:>5}{row.per_element:8.1f}/{row.element:<6}{row.barriers_per_8kb:7.1f}{row.registers:6}"
        f"{row.resident:4}{row.waves:7.1f}{span:>18}{row.floor_us:8.1f}{target:>8}  {row.bound}"
    )


HEADER = (
    f"{'':30}{'hot':>5}{'instructions':>15}{'bars':>7}{'regs':>6}{'res':>4}{'waves':>7}{'microseconds':>18}{'floor':>8}"
    f"{'target':>8}  bound"
)


def digests(kernel: Kernel, arch: str) -> Digests:
    """Without compiling; the IR only when it is asked for."""
    launch = captured(kernel, arch)
    return Digests(launch.source, launch.launch, lambda: captured(kernel, arch, ir=True).ir)


def write(path: Path, done: Sequence[Row]) -> None:
    """Put rows into the file; those of other kernels stay."""
    rows.replace(path, done, KEY)
