"""Time every op beside its floor, plain PyTorch and installed engines, each only after it equals the reference.

Every case is first run once and compared with the reference; a case that differs gives no time, and the exit code is 1. Then
CUDA-graph replays and eager calls are timed, on inputs that have left the cache (cold) and on the same ones again (warm). What a
captured graph writes is compared with the checked result, bit by bit, before it is timed.

Without a GPU, or with TRITON_INTERPRET=1, small versions of the cases run in Triton's interpreter, and no times are taken.

    python -m bench.kernels                          all cases, and plain PyTorch beside them; functions of flashinfer, vllm and
                                                     sgl_kernel too, where they import (bench/shared/engines.py)
    python -m bench.kernels --op accept_chain        one op (repeatable); --case dense_r64 one case
    python -m bench.kernels --check                  compare with the reference, take no times
    python -m bench.kernels --counters               without a GPU: instructions and bytes per logit of the compiled kernels,
                                                     counted while they run on a CPU (bench/shared/counters.py); 1, 8 and 64 requests
    python -m bench.kernels --host                   without a GPU: CPU time of a call before its launch (bench/kernels/host.py)

Rows of other cases stay in the output file. Times are microseconds; share = floor / median, the floor being the bytes that must
move once over the bandwidth of a device copy measured in the same run. Targets were set for one NVIDIA H200.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.kernels.report import report
from bench.shared import counters, timing
from bench.shared.arguments import BadArgument, Parser, first_line
from bench.shared.cases.registry import registry
from bench.shared.interpreter import prepare_triton
from bench.shared.measure import CONTENDERS, QUICK_SAMPLES, SAMPLES, Bench, check, facts_of
from bench.shared.paths import result_file


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = Parser(prog="python -m bench.kernels", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--op", action="append", metavar="NAME", help="only this op (repeatable)")
    p.add_argument("--case", action="append", metavar="NAME", help="only cases of this name (repeatable)")
    p.add_argument("--out", metavar="FILE", help="the CSV file (default: bench/results/kernels-<gpu>.csv)")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples instead of {SAMPLES}, no torch.compile")
    p.add_argument("--no-baselines", action="store_true", help="time the ops alone, without PyTorch and installed engines")
    p.add_argument("--check", action="store_true", help="compare with the reference and take no times")
    p.add_argument("--small", action="store_true", help="small versions of the cases (always without a GPU)")
    p.add_argument("--counters", action="store_true", help="count instructions and bytes of the compiled kernels, without a GPU")
    p.add_argument("--host", action="store_true", help="time what calls cost the CPU before their launches, without a GPU")
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


def main(argv: Sequence[str] | None = None) -> int:
    """0: all cases are right; 1: one is not; 2: a bad argument."""
    try:
        arguments = parser().parse_args(argv)
        if arguments.counters:
            return count_all(arguments)
        if arguments.host:
            return time_host(arguments)
        interpreted = prepare_triton()
        cases = choose(registry(), arguments.op, arguments.case)
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


if __name__ == "__main__":
    sys.exit(main())
