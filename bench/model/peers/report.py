"""Rows of the peers' report: each kernel of a step, its torch ops, and the step. All of it is MODELLED.

Columns are those of bench/model/report.py where they have the same name. Of the others:

peer, version, path       the package, its version, and which of its ways
kernel                    a Triton kernel; "torch ops"; or "step", the sum of the rows above it: instructions and barriers there
                          are those of all streaming kernels per logit of our op
launches, torch_ops       of a step, and of how many of these the row speaks
torch_bytes               read and written once each
note                      what is in the step, and what is not

Times. A launch: bench/model/estimate.py, with nothing that follows the hot part, since a program's whole way is in it
(bench/model/peers/way.py). A torch op: a launch, and its bytes at the bandwidth of a copy; no guess is made of how far from that
its kernel is. As for our ops, nothing stays in the L2 cache from one launch to the next: an intermediate result is written to
memory and read from there. A loop over drafts turns K times, as if all were accepted, and a row is drawn from as if one was not.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from bench.model import constants, estimate
from bench.model.constants import MACHINES, Machine
from bench.model.flow import Flow
from bench.model.hot import Hot
from bench.model.peers import way
from bench.model.peers.record import Recorded, record
from bench.model.peers.step import Step, Stream
from bench.model.report import FOLDER, STATUS
from bench.model.sass import disassemble
from bench.shared import rows
from bench.shared.cases.case import DRAFTS, VOCAB
from bench.shared.occupancy import resident
from bench.shared.offline.binary import inspect_binary
from bench.shared.offline.capture import Launch
from dspark_kernels.launch.arch import KNOWN

REPORT = FOLDER / "peers-h200.csv"
KEY = ("op", "case", "arch", "peer", "path", "kernel")
STEP, TORCH = "step", "torch ops"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report."""

    op: str
    case: str
    arch: str
    status: str
    gpu: str
    peer: str
    version: str
    path: str
    kernel: str
    launches: int
    torch_ops: int
    hot: str | None = None
    tile: float | None = None
    per_element: float | None = None
    barriers_per_8kb: float | None = None
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    num_warps: int | None = None
    resident: int | None = None
    programs: int | None = None
    turns: float | None = None
    waves: float | None = None
    must_move: int = 0
    torch_bytes: int = 0
    dram_us: float | None = None
    issue_us: float | None = None
    lives_us: float | None = None
    low_us: float = 0.0
    us: float = 0.0
    high_us: float = 0.0
    bound: str | None = None
    note: str = ""
    triton: str = ""


@dataclasses.dataclass(frozen=True)
class Modelled:
    """A launch with its hot part and its times: optimistic, central, pessimistic."""

    launch: Launch
    stream: Stream | None
    hot: Hot
    tile: float
    registers: int
    spills: int
    shared: int
    warps: int
    seats: int
    programs: int
    turns: float
    times: list[estimate.Time]

    @property
    def logits(self) -> int:
        return self.stream.logits if self.stream else 0

    @property
    def bytes(self) -> int:
        return round(self.logits * self.stream.moves) if self.stream else 0

    @property
    def per_logit(self) -> float:
        return 32 * self.warps * self.hot.instructions / self.tile if self.stream else 0.0

    @property
    def barriers(self) -> float:
        """Per 8 KB that stream."""
        return self.hot.barriers * 8192 / (self.tile * self.stream.moves) if self.stream else 0.0


def modelled(step: Step, launches: Sequence[Launch], arch: str) -> list[Modelled]:
    """Of every launch of a step."""
    before: collections.Counter = collections.Counter()
    done: dict[tuple, Modelled] = {}
    found = []
    for launch in launches:
        streams = step.streams.get(launch.kernel, ())
        stream = streams[min(before[launch.kernel], len(streams) - 1)] if streams else None
        before[launch.kernel] += 1
        key = (launch.kernel, launch.launch, launch.grid, stream)
        if key not in done:
            done[key] = _modelled(step, launch, stream, arch)
        found.append(done[key])
    return found


def _modelled(step: Step, launch: Launch, stream: Stream | None, arch: str) -> Modelled:
    binary, metadata = inspect_binary(launch.compiled), launch.compiled.metadata
    warps, programs = metadata.num_warps, math.prod(launch.grid)
    seats = resident(KNOWN[arch], binary["registers"], warps, metadata.shared)
    tile = stream.tile(launch.constants) if stream else 1
    enough = math.ceil(stream.loads * tile / (32 * warps)) if stream else 0
    flow = Flow(disassemble(launch.compiled.asm["cubin"]))
    hot = way.hot_of(way.choose(flow, enough, step.sampled), enough, DRAFTS)
    turns: float = DRAFTS if hot.loops else 1
    if stream:
        span = stream.span or tile
        programs, turns = stream.rows * math.ceil(VOCAB / span), math.ceil(span / tile) if hot.loops else 1
    moved = stream.logits * stream.moves if stream else 0
    times = estimate.estimate(hot, estimate.Load(moved, programs, turns, warps, seats, ()), MACHINES[arch])
    return Modelled(
        launch=launch, stream=stream, hot=hot, tile=tile, registers=binary["registers"],
        spills=binary["spill_stores"] + binary["spill_loads"], shared=metadata.shared, warps=warps, seats=seats, programs=programs,
        turns=turns, times=times,
    )  # fmt: skip


def rows_of(step: Step, modules: SimpleNamespace, peer: str, version: str, arch: str, ours: float) -> list[Row]:
    """Of the kernels of a step, of its torch ops, and of the step. ours: logits of our op."""
    recorded = record(lambda: step.run(modules), arch)
    machine, launches = MACHINES[arch], modelled(step, recorded.launches, arch)
    by_kernel: dict[str, list[Modelled]] = {}
    for each in launches:
        by_kernel.setdefault(each.launch.kernel, []).append(each)
    head = dict(op=step.op, case=step.case, arch=arch, status=STATUS, gpu=machine.name, peer=peer, version=version, path=step.path)
    head |= dict(triton=_triton())
    found = [Row(**head, kernel=name, **_kernel(of_one, machine)) for name, of_one in by_kernel.items()]
    if recorded.ops:
        found.append(Row(**head, kernel=TORCH, **_torch(recorded, machine)))
    total = dict(
        launches=sum(row.launches for row in found), torch_ops=len(recorded.ops), must_move=sum(row.must_move for row in found),
        torch_bytes=sum(row.torch_bytes for row in found), per_element=sum(m.per_logit * m.logits for m in launches) / ours,
        barriers_per_8kb=sum(m.barriers * m.bytes for m in launches) / (sum(m.bytes for m in launches) or 1),
        **{name: sum(getattr(row, name) for row in found) for name in ("low_us", "us", "high_us")}, note=step.note,
    )  # fmt: skip
    return [*found, Row(**head, kernel=STEP, **total)]


def _kernel(launches: Sequence[Modelled], machine: Machine) -> dict:
    """Columns of a kernel: the sum of the times of its launches, all else of the longest of them."""
    longest = max(launches, key=lambda each: each.times[1].total)
    low, central, high = (sum(each.times[level].total for each in launches) for level in range(3))
    time = longest.times[1]
    return dict(
        launches=len(launches), torch_ops=0, hot=longest.hot.how, tile=float(longest.tile),
        per_element=longest.per_logit if longest.stream else None,
        barriers_per_8kb=longest.barriers if longest.stream else None, registers=longest.registers, spills=longest.spills,
        shared=longest.shared, num_warps=longest.warps, resident=longest.seats, programs=longest.programs,
        turns=float(longest.turns), waves=longest.programs / (machine.multiprocessors * longest.seats),
        must_move=sum(each.bytes for each in launches),
        dram_us=time.dram, issue_us=time.issue, lives_us=time.lives, low_us=low, us=central, high_us=high, bound=time.bound,
    )  # fmt: skip


def _torch(recorded: Recorded, machine: Machine) -> dict:
    size = sum(op.bytes for op in recorded.ops)
    low, central, high = (len(recorded.ops) * each + 1e6 * size / machine.bandwidth for each in constants.LAUNCH)
    names = collections.Counter(op.name for op in recorded.ops)
    return dict(
        launches=0, torch_ops=len(recorded.ops), torch_bytes=size, dram_us=1e6 * size / machine.bandwidth, low_us=low, us=central,
        high_us=high, note=", ".join(f"{count} {name}" for name, count in names.items()),
    )  # fmt: skip


def _triton() -> str:
    import triton

    return triton.__version__


def our_line(row) -> str:
    """Our op, above the steps that do the same."""
    return _line(row.label, row, f"1 launch of {row.kernel}")


def line(row: Row) -> str:
    """A step."""
    return _line(f"  {row.peer} {row.version}, {row.path}", row, f"{row.launches} launches, {row.torch_ops} torch ops")


def _line(name: str, row, made_of: str) -> str:
    span = f"{row.us:.0f} ({row.low_us:.0f}-{row.high_us:.0f})"
    return f"{name:45}{row.per_element:8.1f}/logit{row.barriers_per_8kb:7.1f}{span:>22}   {made_of}"


def write(path: Path, done: Sequence[Row]) -> None:
    """Put rows into the file; those of other steps stay."""
    rows.replace(path, done, KEY)
