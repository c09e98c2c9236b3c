"""What bench.kernels does once its arguments are known: choose cases, compare them with the reference, time or count."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from bench.kernels.report import report
from bench.shared import counters, timing
from bench.shared.cases.registry import registry
from bench.shared.command import BadArgument, first_line
from bench.shared.interpreter import prepare_triton
from bench.shared.measure import CONTENDERS, QUICK_SAMPLES, SAMPLES, Bench, check, facts_of
from bench.shared.paths import result_file


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


def run(arguments) -> int:
    """0: all cases are right; 1: one is not. Raises BadArgument."""
    if arguments.counters:
        return count_all(arguments)
    if arguments.host:
        return time_host(arguments)
    interpreted = prepare_triton()
    cases = choose(registry(), arguments.op, arguments.case)
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
    cases = registry()
    cases = choose(cases if arguments.op or arguments.case else counters.chosen(cases), arguments.op, arguments.case)
    out = Path(arguments.out) if arguments.out else counters.RESULT
    return counters.main(cases, out, arguments.requests or counters.REQUESTS)


def time_host(arguments) -> int:
    """--host: compiled kernels are wanted, and none is launched."""
    if torch.cuda.is_available():
        raise BadArgument("--host: times calls on a machine without a GPU")
    os.environ.pop("TRITON_INTERPRET", None)
    from bench.kernels import host

    cases = host.choose(arguments.op, arguments.case)
    if arguments.list:
        print("\n".join(" ".join(case) for case in cases))
        return 0
    return host.main(cases, Path(arguments.out) if arguments.out else host.RESULT)


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
    path = Path(arguments.out) if arguments.out else result_file("kernels", machine.gpu)
    print(
        f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, Triton {machine.triton}, {machine.commit}: a device copy"
        f" moves {bandwidth / 1e9:.0f} GB/s, {machine.l2_bytes / 2**20:.0f} MiB L2, microseconds"
    )
    return report(cases, bench, path)
