"""What bench.model does once its arguments are known: compare reports, or model, count and show kernels."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.model import machine, measured, ops, peers, report
from bench.model.check import KEY, grown, stale
from bench.model.constants import MACHINES
from bench.model.flow import Flow
from bench.model.sass import disassemble
from bench.shared import rows
from bench.shared.command import BadArgument, first_line


def choose(kernels: Sequence[ops.Kernel], names, cases) -> list[ops.Kernel]:
    """The kernels asked for. Raises BadArgument where there is none."""
    chosen = [k for k in kernels if (not names or k.case.op in names) and (not cases or k.case.name in cases)]
    if not chosen:
        there = ", ".join(f"{k.case.op} {k.case.name}" for k in kernels)
        raise BadArgument(f"--op, --case: expected one of {there}, got none of them")
    return chosen


def run(arguments) -> int:
    """0: done; 1: rows are stale, or a hot part has grown. Raises BadArgument."""
    if arguments.compare:
        return told(grown(*(rows.read(path) for path in arguments.compare)), "no hot part has grown")
    kernels = choose(ops.kernels(), arguments.op, arguments.case)
    torch.set_num_threads(1)
    committed = report.FOLDER / (MACHINES[arguments.arch].name.lower().replace(" ", "-") + ".csv")
    if arguments.machine:
        return counted(kernels, committed, arguments.out or machine.FILE, arguments.arch)
    out = arguments.out or committed
    if arguments.check:
        return check(kernels, out, arguments)
    if arguments.blocks:
        for kernel in kernels:
            blocks(kernel, arguments.arch)
        return 0
    return model(kernels, out, arguments)


def told(found: Sequence[str], otherwise: str) -> int:
    print("\n".join(found) or otherwise)
    return 1 if found else 0


def check(kernels, out: Path, arguments) -> int:
    """Of the rows of this architecture those that were chosen, or all."""
    code = {(k.case.op, k.case.name, arguments.arch): report.digests(k, arguments.arch) for k in kernels}
    every = not arguments.op and not arguments.case
    committed = [row for row in _read(out) if row["arch"] == arguments.arch and (every or _key(row) in code)]
    found = stale(code, committed) + grown(_read(report.BASELINE), committed)
    return told(found, f"{len(committed)} rows are fresh, and none is worse than the baseline")


def _key(row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def model(kernels, out: Path, arguments) -> int:
    """Model every kernel; each line is printed as soon as it is there."""
    gpu = MACHINES[arguments.arch]
    print(
        f"MODELLED, not measured: {gpu.name}, {gpu.multiprocessors} multiprocessors at {gpu.clock} GHz, a copy moves"
        f" {gpu.bandwidth / 1e12:g} TB/s; instructions per element of the hot part, barriers per 8 KB"
    )
    # Before anything is compiled for a GPU that is not there: the compiled kernels of a process are kept by device.
    times = measured.microseconds([k.case for k in kernels], arguments.arch)
    print(report.HEADER + ("   measured (/ modelled)" if times else ""))
    done = []
    for kernel in kernels:
        row = report.row_of(kernel, arguments.arch)
        done.append(row)
        time = times.get((row.op, row.case))
        beside = "" if time is None else f"   {time:.1f} ({time / row.us:.2f})" if isinstance(time, float) else f"   {time}"
        print(report.lines(row) + beside, flush=True)
    for line in peers.lines(kernels, done, arguments.arch, peers.beside(out)):
        print(line, flush=True)
    report.write(out, done)
    print(f"written to {out}")
    if arguments.baseline:
        report.write(report.BASELINE, done)
    new = [{name: rows.cell(value) for name, value in dataclasses.asdict(row).items()} for row in done]
    baseline = _read(report.BASELINE)
    compared = {_key(row) for row in baseline} & {_key(row) for row in new}
    return told(grown(baseline, new), f"{len(compared)} rows are compared with the baseline, and none is worse")


def counted(kernels, modelled: Path, out: Path, arch: str) -> int:
    """The instructions of the report `modelled` beside those of the machine; each line is printed and written as soon as it is there."""
    print(f"{'':30}{'modelled (SASS)':>16}{'counted (PTX)':>16}{'ratio':>8}")
    done = []
    try:
        for row in machine.compared(kernels, _read(modelled), arch):
            done.append(row)
            why = "no reason is named" if row.reason is None else row.reason
            print(f"{row.op + ' ' + row.case:30}{row.modelled:16.1f}{row.counted:16.1f}{row.ratio:8.2f}  {why}", flush=True)
            machine.write(out, [row])
    except (RuntimeError, ValueError) as error:
        raise BadArgument(f"--machine: {first_line(error)}") from None
    apart = [f"{row.op} {row.case}: {row.ratio:.2f} times, and no reason is named" for row in done if row.reason is None]
    return told(apart, f"written to {out}")


def _read(path: Path) -> list[dict]:
    """The rows of a report, none where there is no file yet."""
    return rows.read(path) if path.exists() else []


def blocks(kernel: ops.Kernel, arch: str) -> None:
    """Loops, and blocks with loads, barriers or products: address, instructions by class, how deep, behind how many branches."""
    launch = report.captured(kernel, arch, compiled=True)
    flow = Flow(disassemble(launch.compiled.asm["cubin"]))
    hot, tile, tile_from = report.hot_part(kernel, launch, flow)
    inside = {i.address for i in hot.turn}
    print(f"\n{kernel.case.op} {kernel.case.name}: {launch.kernel}, grid {launch.grid}; hot: a {hot.how} of {hot.instructions:g}")
    print(f"instructions, {tile:g} x {kernel.element} a turn (from its {tile_from})")
    for loop in flow.loops:
        turn = flow.of_a_turn(loop)
        every, all_of_it = (sum(len(flow.blocks[b]) for b in part) for part in (turn, loop.blocks))
        print(f"loop at {flow.blocks[loop.head][0].address:05x}: {every} instructions every turn, {all_of_it} in all")
    for number, block in enumerate(flow.blocks[:-1]):
        classes = collections.Counter(i.kind for i in block)
        loaded = sum(i.loaded for i in block)
        if loaded or classes["barrier"] or classes["tensor"]:
            depth = sum(number in loop.blocks for loop in flow.loops)
            where = "hot" if block[0].address in inside else ""
            text = " ".join(f"{kind} {count}" for kind, count in classes.most_common())
            print(
                f"  {block[0].address:05x} {where:3} {depth} loops, {flow.conditions(number)} branches, {loaded} B a lane: {text}"
            )
