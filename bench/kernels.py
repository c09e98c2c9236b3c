"""Time every op beside its floor, plain PyTorch and installed engines, each only after it equals the reference.

Every case is first run once and compared with the reference; a case that differs gives no time, and the exit code is 1. Then
CUDA-graph replays and eager calls are timed, on inputs that have left the cache (cold) and on the same ones again (warm). What a
captured graph writes is compared with the checked result, bit by bit, before it is timed.

Without a GPU, or with TRITON_INTERPRET=1, small versions of the cases run in Triton's interpreter, and no times are taken.

    python -m bench.kernels                          all cases, and plain PyTorch beside them; functions of flashinfer, vllm and
                                                     sgl_kernel too, where they import (bench/engines.py)
    python -m bench.kernels --op accept_chain        one op (repeatable); --case dense_r64 one case
    python -m bench.kernels --check                  compare with the reference, take no times
    python -m bench.kernels --counters               without a GPU: instructions and bytes per logit of the compiled kernels,
                                                     counted while they run on a CPU (bench/counters.py); 1, 8 and 64 requests

Rows of other cases stay in the output file. Times are microseconds; share = floor / median, the floor being the bytes that must
move once over the bandwidth of a device copy measured in the same run. Targets were set for one NVIDIA H200.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.shared import timing

RESULTS = timing.ROOT / "bench" / "results"
SAMPLES, QUICK_SAMPLES = 200, 30
CONTENDERS = ("kernel", "pytorch", "torch.compile", "engines")  # engines: those of bench/engines.py that import
CALLS = ("graph", "eager")
CACHES = ("cold", "warm")


class BadArgument(Exception):
    """Message of one line that names the argument."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report. Times in microseconds, None where there is none; status "ok", or why there is no time."""

    op: str
    case: str
    contender: str
    call: str
    cache: str
    status: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    input_sets: int = 0
    bytes: int = 0
    flops: int = 0
    copy_gb_per_s: float | None = None
    floor_us: float | None = None
    issue_us: float | None = None
    share_of_floor: float | None = None
    target_us: float | None = None
    met: str = ""  # "yes", "no", "" without a target
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    sm_clock_mhz: str = ""
    memory_clock_mhz: str = ""
    max_sm_clock_mhz: str = ""


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how a case is timed. bandwidth: bytes per second of a device copy. capture: a call to its replay."""

    device: torch.device
    clock: object
    machine: timing.Machine
    bandwidth: float
    samples: int
    baselines: tuple[str, ...]
    small: bool
    capture: Callable
    facts: Callable[[], dict]  # columns about the machine, read after the times of a case


# --- one case ---------------------------------------------------------------------------------------------------------


def inputs_of(spec, seed: int, device) -> dict:
    from bench.shared.cases import registry as kernel_cases

    inputs = kernel_cases.mapped(spec.make(seed), lambda tensor: tensor.to(device))
    # What a step makes once for all layers is an input of the call.
    return spec.prepare(inputs) if hasattr(spec, "prepare") else inputs


def check(spec, device, seed: int = 1, on_host: bool = False):
    """(inputs, checked result). Raises AssertionError where the op differs from the reference.

    on_host: where the reference computes; it makes thousands of small launches on a GPU.
    """
    from bench.shared.cases import registry as kernel_cases

    inputs = inputs_of(spec, seed, device)
    result, evidence = spec.run(inputs)
    compared = (inputs, result, evidence)
    spec.compare(*(kernel_cases.mapped(compared, lambda tensor: tensor.cpu()) if on_host else compared))
    return inputs, result


def run(case, bench: Bench) -> list[Row]:
    """Check a case, then time it and its baselines. A case that is not right gives one row without a time."""
    spec = case.spec.small() if bench.small else case.spec
    try:
        inputs, result = check(spec, bench.device, on_host=bench.small)
        return _timed(case, spec, inputs, result, bench)
    except AssertionError as error:
        return [_no_time(case, "kernel", "red: " + first_line(error))]
    except Exception as error:  # a kernel that does not compile or run must not hide the other cases
        return [_no_time(case, "kernel", f"failed: {type(error).__name__}: {first_line(error)}")]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _no_time(case, contender: str, status: str, call: str = "", cache: str = "") -> Row:
    return Row(case.op, case.name, contender, call, cache, status)


def _timed(case, spec, inputs, result, bench: Bench) -> list[Row]:
    import dspark_kernels as dk
    from bench.shared.cases import registry as kernel_cases

    size = kernel_cases.nbytes(inputs) + kernel_cases.nbytes(result)
    count, between = timing.input_sets(size, bench.machine.l2_bytes)
    flush = timing.Flush(between, bench.device)
    sets = [inputs] + [_another(spec, inputs, 1 + i, bench.device) for i in range(1, count)]
    workspace = spec.workspace(bench.device)
    op = getattr(dk, spec.op)

    def kernel_call(given, out):
        if hasattr(spec, "call"):
            return lambda: spec.call(given)
        return lambda: op(**given, out=out, workspace=workspace)

    # Every set writes memory of its own, so that a result that is still in the cache saves no write.
    outs = [result] + [kernel_cases.mapped(result, torch.empty_like) for _ in sets[1:]]
    want = kernel_cases.mapped(result, torch.clone)
    calls = [kernel_call(*pair) for pair in zip(sets, outs, strict=True)]
    rows = []
    with torch.no_grad():
        for name in ("kernel", *_names(case.op, inputs, bench.baselines)):
            for how in CALLS:
                timed = None  # the graphs of a baseline hold gigabytes
                try:
                    if name != "kernel":
                        calls = _baseline_calls(case.op, name, sets)
                    timed = [bench.capture(call) for call in calls] if how == "graph" else calls
                    if name == "kernel":
                        _same_again(timed[0], result, want)
                    for cache in CACHES:
                        rows.append(_measured(case, spec, name, how, cache, timed, flush, bench))
                except Exception as error:
                    if name == "kernel":
                        raise  # no time of this case is to be believed
                    rows.append(_no_time(case, name, f"failed: {type(error).__name__}: {first_line(error)}", how))
    facts = bench.facts()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # what graphs held
    return [dataclasses.replace(row, **facts) for row in rows]


def _measured(case, spec, name, how, cache, calls, flush, bench: Bench) -> Row:
    """Cold: all sets in turn, the cache emptied in between; warm: the first set alone."""
    calls, before = (calls, flush) if cache == "cold" else (calls[:1], None)
    measured = timing.measure(calls, bench.clock, count=bench.samples, queued=how == "graph", before=before)
    return _row(case, spec, name, how, cache, measured, len(calls), bench)


def _another(spec, inputs, seed: int, device) -> dict:
    """Further inputs: of another seed where there are few requests, whose course is chance, and where addresses are among the
    inputs; else the same in other memory."""
    from bench.shared.cases import registry as kernel_cases

    if spec.requests < 8 or hasattr(spec, "call"):
        return inputs_of(spec, seed, device)
    return kernel_cases.mapped(inputs, torch.clone)


def _same_again(call, result, want) -> None:
    """Run once more into poisoned outputs. Raises AssertionError unless every bit is the checked one's."""
    from bench.shared.cases import registry as kernel_cases

    kernel_cases.poison(result)
    call()
    kernel_cases.require(kernel_cases.same(result, want), "a second run writes something else than the checked one")


def _names(op: str, inputs, baselines) -> list[str]:
    """With "engines" replaced by those that are installed; PyTorch only where there is a function for the op."""
    from bench.shared import engines
    from bench.shared.baselines import BASELINES

    found = []
    for name in baselines:
        found += engines.installed(op, inputs) if name == "engines" else [name] * (op in BASELINES)
    return found


def _baseline_calls(op: str, name: str, sets) -> list[Callable]:
    from bench.shared import engines
    from bench.shared.baselines import BASELINES

    baseline = engines.checked(op, name, sets[0]) if name in engines.ENGINES.get(op, {}) else BASELINES[op]
    function = baseline.function
    if name == "torch.compile":
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)
    return [functools.partial(function, *baseline.arguments(given)) for given in sets]


def _row(case, spec, contender, call, cache, measured: timing.Timing, sets: int, bench: Bench) -> Row:
    floor = 1e6 * spec.bytes / bench.bandwidth
    lanes = bench.machine.lanes_per_second
    issue = None if lanes is None else 1e6 * spec.instructions / lanes
    row = Row(
        case.op, case.name, contender, call, cache, "ok", measured.p20, measured.p50, measured.p80, measured.samples, sets,
        spec.bytes, spec.flops, bench.bandwidth / 1e9, floor, issue, floor / measured.p50,
    )  # fmt: skip
    # Targets are for what an engine does: replay a graph after the target's pass has emptied the cache.
    if case.target is not None and (contender, call, cache) == ("kernel", "graph", "cold"):
        limit = case.target.limit(floor, issue)
        row = dataclasses.replace(row, target_us=limit, met="yes" if measured.p50 <= limit else "no")
    return row


def facts_of(device) -> dict:
    """Columns about the machine as it is now."""
    machine = timing.machine(device)
    return dict(
        gpu=machine.gpu, driver=machine.driver, torch=machine.torch, triton=machine.triton, commit=machine.commit,
        sm_clock_mhz=machine.sm_clock, memory_clock_mhz=machine.memory_clock, max_sm_clock_mhz=machine.max_sm_clock,
    )  # fmt: skip


# --- report -----------------------------------------------------------------------------------------------------------


def _cell(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into the file: all rows of their cases are replaced, those of other cases stay."""
    done = {(row.op, row.case) for row in rows}
    kept = []
    if path.exists():
        with open(path, newline="") as file:
            kept = [row for row in csv.DictReader(file) if (row.get("op"), row.get("case")) not in done]
    new = [{name: _cell(getattr(row, name)) for name in COLUMNS} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
    partial.replace(path)


HEADER = ("", "p20", "median", "p80", "floor", "share", "target", "met")


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows of a case for the screen."""
    text = []
    for row in rows:
        label = " ".join(part for part in (row.contender, row.call, row.cache) if part)
        if row.status != "ok":
            text.append(f"  {label.ljust(26)} {row.status}")
            continue
        cells = [f"{value:9.2f}" for value in (row.p20_us, row.p50_us, row.p80_us, row.floor_us)]
        cells.append(f"{row.share_of_floor:8.0%}")
        if row.target_us is not None:
            cells.append(f"{row.target_us:9.2f}  {row.met}")
        text.append(f"  {label.ljust(26)} {''.join(cells)}")
    return text


def file_name(gpu: str) -> str:
    """kernels-<gpu>.csv with the GPU's name in small letters and dashes."""
    return f"kernels-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.csv"


# --- command ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadArgument(message)


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = _Parser(
        prog="python -m bench.kernels", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--op", action="append", metavar="NAME", help="only this op (repeatable)")
    p.add_argument("--case", action="append", metavar="NAME", help="only cases of this name (repeatable)")
    p.add_argument("--out", metavar="FILE", help="the CSV file (default: bench/results/kernels-<gpu>.csv)")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples instead of {SAMPLES}, no torch.compile")
    p.add_argument("--no-baselines", action="store_true", help="time the ops alone, without PyTorch and installed engines")
    p.add_argument("--check", action="store_true", help="compare with the reference and take no times")
    p.add_argument("--small", action="store_true", help="small versions of the cases (always without a GPU)")
    p.add_argument("--counters", action="store_true", help="count instructions and bytes of the compiled kernels, without a GPU")
    p.add_argument("--requests", type=int, action="append", metavar="R", help="with --counters: this many requests (repeatable)")
    p.add_argument("--list", action="store_true", help="print the cases with their bytes and operations, and stop")
    return p


def choose(cases, ops, names):
    """The cases asked for. Raises BadArgument for a name that is not known."""
    for option, given, known in (("--op", ops, [c.op for c in cases]), ("--case", names, [c.name for c in cases])):
        known = list(dict.fromkeys(known))
        for name in given or ():
            if name not in known:
                raise BadArgument(f"{option}: expected one of {', '.join(known)}, got {name!r}")
    chosen = [case for case in cases if (not ops or case.op in ops) and (not names or case.name in names)]
    if not chosen:
        there = ", ".join(dict.fromkeys(case.name for case in cases if case.op in ops))
        raise BadArgument(f"--case: expected one of {there} (of {', '.join(ops)}), got {', '.join(names)}")
    return chosen


def prepare_triton() -> bool:
    """Compiled kernels where there is a GPU; the repaired interpreter where there is none or TRITON_INTERPRET=1 asks for it.

    True for the interpreter. Triton reads the variable when it is imported, so this comes before the first op.
    """
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    os.environ["TRITON_INTERPRET"] = "1"
    from dspark_kernels.testing import interpreter

    try:
        interpreter.repair()
    except ImportError as error:
        raise BadArgument(f"needs a GPU or Triton's interpreter: {first_line(error)}") from None
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """0: all cases are right; 1: one is not; 2: a bad argument."""
    try:
        arguments = parser().parse_args(argv)
        if arguments.counters:
            return count_all(arguments)
        interpreted = prepare_triton()
        from bench.shared.cases import registry as kernel_cases

        cases = choose(kernel_cases.registry(), arguments.op, arguments.case)
    except BadArgument as error:
        print(f"bench.kernels: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        for case in cases:
            print(f"{case.op:18} {case.name:18} {case.spec.bytes:>14,} bytes {case.spec.flops:>16,} flops")
        return 0
    if interpreted or arguments.check:
        return check_all(cases, torch.device("cpu" if interpreted else "cuda"), interpreted or arguments.small, interpreted)
    return time_all(cases, arguments, torch.device("cuda", torch.cuda.current_device()))


def count_all(arguments) -> int:
    """--counters: the machine must be installed before the first kernel is defined, so it comes before the cases."""
    if torch.cuda.is_available():
        raise BadArgument("--counters: counts on a machine without a GPU")
    os.environ.pop("TRITON_INTERPRET", None)
    from bench import counters
    from bench.shared.cases import registry as kernel_cases

    cases = kernel_cases.registry()
    cases = choose(cases if arguments.op or arguments.case else counters.chosen(cases), arguments.op, arguments.case)
    out = Path(arguments.out) if arguments.out else counters.RESULTS
    return counters.main(cases, out, arguments.requests or counters.REQUESTS)


def check_all(cases, device, small: bool, interpreted: bool) -> int:
    """Compare every case with the reference; no times."""
    wrong = 0
    for number, case in enumerate(cases, 1):
        start = time.perf_counter()
        try:
            check(case.spec.small() if small else case.spec, device, on_host=small)
            verdict = "equals the reference"
        except AssertionError as error:
            verdict = "RED: " + first_line(error)
            wrong += 1
        except Exception as error:
            verdict = f"FAILED: {type(error).__name__}: {first_line(error)}"
            wrong += 1
        seconds = "" if interpreted else f", {time.perf_counter() - start:.1f} s with the reference"
        print(f"[{number}/{len(cases)}] {case.op} {case.name}: {verdict}{seconds}", flush=True)
    why = "TRITON_INTERPRET=1" if torch.cuda.is_available() else "no GPU"
    where = f"{why}: small cases in Triton's interpreter" if interpreted else "small cases" if small else "full size"
    print(f"{where}; {len(cases) - wrong} of {len(cases)} equal the reference; no times were taken")
    return 1 if wrong else 0


def time_all(cases, arguments, device) -> int:
    """Measure the machine, then the cases."""
    clock = timing.DeviceClock()
    bandwidth = timing.copy_bandwidth(clock, device)
    machine = timing.machine(device)
    baselines = () if arguments.no_baselines else ("pytorch", "engines") if arguments.quick else CONTENDERS[1:]
    bench = Bench(
        device=device,
        clock=clock,
        machine=machine,
        bandwidth=bandwidth,
        samples=QUICK_SAMPLES if arguments.quick else SAMPLES,
        baselines=baselines,
        small=arguments.small,
        capture=timing.graph_of,
        facts=lambda: facts_of(device),
    )
    path = Path(arguments.out) if arguments.out else RESULTS / file_name(machine.gpu)
    print(
        f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, Triton {machine.triton}, {machine.commit}: a device copy"
        f" moves {bandwidth / 1e9:.0f} GB/s, {machine.l2_bytes / 2**20:.0f} MiB L2, microseconds"
    )
    return report(cases, bench, path)


def report(cases, bench: Bench, path: Path) -> int:
    """Run cases one after another, each printed and written as soon as it is done."""
    wrong = []
    header = HEADER[0].ljust(29) + "".join(name.rjust(9) for name in HEADER[1:5]) + HEADER[5].rjust(8) + HEADER[6].rjust(9)
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.op} {case.name}", flush=True)
        rows = run(case, bench)
        if number == 1:
            print(f"{header}  {HEADER[7]}")
        print("\n".join(lines(rows)), flush=True)
        write(path, rows)
        if any(row.status != "ok" and row.contender == "kernel" for row in rows):
            wrong.append(f"{case.op} {case.name}")
    print(f"written to {path}")
    if wrong:
        print(f"not right, so not timed: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
